"""Colours and names of metrics, shared by printed and interactive figures; needs no library."""

DARK, LIGHT, GREY = "#0B4F79", "#C5D9E6", "#6E6E6E"
LABELS = {"AP": "AP (IoU 0.50:0.95)", "AP50": "AP50 (IoU 0.5)", "mAP": "mAP (IoU 0.5)"}
