"""A detector of torchvision; `name` of its builder says which."""

model = {
    "type": "TorchvisionDetector",
    "builder": {},  # numbers for the builder
    "num_classes": 80,
    "init_cfg": {"type": "Pretrained", "checkpoint": "DEFAULT"},  # with detector.pretrained=true
}
custom_imports = {"imports": ["ldt.detectors.torchvision_detector"]}
