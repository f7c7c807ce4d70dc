"""ldt: compress visual detectors by location-aware discriminant analysis."""
