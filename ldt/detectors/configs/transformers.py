"""A detector of Hugging Face's transformers; ``name`` or ``config`` of the model say which."""

model = {
    "type": "TransformersDetector",
    "config": {},  # of the model: model_type and its other keys
    "num_classes": 80,
    "test_cfg": {"max_per_img": 300},
}
custom_imports = {"imports": ["ldt.detectors.transformers_detector"]}
