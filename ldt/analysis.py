"""What training has done to the neck: discriminants and correlations on a whole data split."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from ldt.detectors import neck_maps, objects_of
from ldt.discriminant import (
    discriminant_share,
    drop_singletons,
    eigenvalues,
    mean_abs_correlation,
    object_vectors,
    scatter,
)


def all_vectors(
    detector: Any, loader: Iterable[dict[str, Any]], neck: str = "auto"
) -> tuple[list[Tensor], Tensor]:
    """Object vectors (eqs. 1-3) of every scale over a whole loader.

    Args:
        detector: an mmdet detector.
        loader: batches with boxes in the coordinates of the network input (``probe_dataloader``).
        neck: name of the tapped module.

    Returns:
        Per scale [K, C], and the labels [K], on the CPU.
    """
    rows: list[list[Tensor]] = []
    labels: list[Tensor] = []
    detector.eval()
    with torch.no_grad():
        for batch in loader:
            data = detector.data_preprocessor(batch, False)
            images = data["inputs"]
            with neck_maps(detector, neck) as maps:
                detector.extract_feat(images)
            objects = objects_of(data["data_samples"], (images.shape[2], images.shape[3]))
            rows.append([object_vectors(m, objects).cpu() for m in maps])
            labels.append(objects.labels.cpu())
    return [torch.cat(scale) for scale in zip(*rows, strict=True)], torch.cat(labels)


def neck_statistics(
    detector: nn.Module,
    loader: Iterable[dict[str, Any]],
    neck: str = "auto",
    ridge: float = 0.1,
) -> list[dict[str, float]]:
    """Per scale, how far the discriminating power is condensed and the channels decorrelated.

    Args:
        detector: an mmdet detector.
        loader: see :func:`all_vectors`.
        neck: name of the tapped module.
        ridge: of S_w, in tr(S_w)/C.

    Returns:
        One dict per scale: ``share`` of the positive eigenvalues' sum held by the top #classes-1,
        ``correlation`` (mean absolute, between channels), ``eigenvalue`` (the largest).
    """
    vectors, labels = all_vectors(detector, loader, neck)
    keep = drop_singletons(labels)
    top = labels[keep].unique().numel() - 1
    found = []
    for scale, x_nc in enumerate(vectors):
        S_w, S_b, _ = scatter(x_nc[keep], labels[keep])
        eigs = eigenvalues(S_w, S_b, ridge)
        found.append(
            {
                "scale": scale,
                "share": float(discriminant_share(eigs, top)),
                "correlation": float(mean_abs_correlation(x_nc)),
                "eigenvalue": float(eigs[-1]),
            }
        )
    return found
