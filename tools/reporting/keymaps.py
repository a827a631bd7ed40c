"""Maps of key stores: where a layer's keys sit on a plane, at each checkpoint that a run still has.

Shapes: S checkpoints, E experts, D width.
"""

from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open

from tools.reporting.curves import plain, spread_out
from trainer.checkpoint import KEYS, checkpoint_folders

MOST_CHECKPOINTS = 12
NEIGHBOURS = 3


def check_umap() -> None:
    """Raises ValueError where UMAP cannot be had."""
    try:
        import umap  # noqa: F401
    except ImportError:
        raise ValueError("--umap needs the package umap-learn; pip install umap-learn, or pip install '.[umap]'") from None


def key_maps(folder: Path, with_umap: bool = False) -> dict[str, Any] | None:
    """The maps of a run by PCA, and by UMAP on request, which takes seconds a layer; None where it has no key store.

    Returns:
        `steps` (S), and a layer each `usage` (S x E), `near` (S x E x 3, the experts of the most similar keys), and
        `projections` by name: `x` and `y` (S x E). One projection holds for all steps of a layer, so that positions compare.
    """
    try:
        folders = checkpoint_folders(folder / "checkpoints")
    except OSError:
        return None  # as where there is none that can be read
    stores = [found for path in reversed(folders) if (found := _read(path))]
    stores = spread_out([s for s in stores if _shapes(s[1]) == _shapes(stores[-1][1])], MOST_CHECKPOINTS)
    if not stores:
        return None
    layers = []
    for layer in range(len(stores[0][1])):
        keys_SED = np.stack([keys[layer][0] for _, keys in stores])
        layers.append(
            {
                "usage": [plain(keys[layer][1], 4) for _, keys in stores],
                "near": [_nearest(keys_ED).tolist() for keys_ED in keys_SED],
                "projections": _projections(keys_SED, with_umap),
            }
        )
    return {"steps": [step for step, _ in stores], "layers": layers}


def _read(path: Path) -> tuple[int, list[tuple[np.ndarray, np.ndarray]]] | None:
    """A checkpoint's step, and of each layer keys (E, D) and usage (E,); None where it has none or cannot be read."""
    try:
        step = int(path.name.removeprefix("step_"))
        with safe_open(path / KEYS, framework="np") as file:
            count = sum(name.endswith("/keys") for name in file.keys())
            layers = [(file.get_tensor(f"{layer}/keys"), file.get_tensor(f"{layer}/usage")) for layer in range(count)]
    except (OSError, ValueError, SafetensorError):
        return None
    is_sound = all(k.ndim == 2 and len(k) == len(u) > 1 and np.isfinite(k).all() for k, u in layers)
    return (step, layers) if layers and is_sound else None


def _shapes(layers: list[tuple[np.ndarray, np.ndarray]]) -> list[tuple[int, ...]]:
    return [keys_ED.shape for keys_ED, _ in layers]


def _nearest(keys_ED: np.ndarray) -> np.ndarray:
    """(E, 3) int, the experts whose keys have the largest cosine with each, most similar first."""
    unit_ED = keys_ED / np.maximum(np.linalg.norm(keys_ED, axis=1, keepdims=True), 1e-30)
    cosine_EE = unit_ED @ unit_ED.T
    np.fill_diagonal(cosine_EE, -np.inf)
    return np.argsort(-cosine_EE, axis=1, kind="stable")[:, : min(NEIGHBOURS, len(keys_ED) - 1)]


def _projections(keys_SED: np.ndarray, with_umap: bool) -> dict[str, Any]:
    S, E, D = keys_SED.shape
    # The axes of the last step: where the run has come to; earlier steps are seen from there.
    middle_D = keys_SED[-1].mean(0)
    spread_ED = keys_SED[-1] - middle_D
    _, sizes, axes = np.linalg.svd(spread_ED.astype(np.float64), full_matrices=False)
    plane_SE2 = (keys_SED - middle_D) @ axes[:2].T
    if plane_SE2.shape[-1] < 2:
        plane_SE2 = np.concatenate([plane_SE2, np.zeros((S, E, 1))], axis=-1)
    shares = (sizes**2 / max((sizes**2).sum(), 1e-30))[:2]
    projections = {"PCA": {**_coordinates(plane_SE2), "explained": plain(shares, 3)}}
    if with_umap and E > 4:
        import umap

        flat = umap.UMAP(random_state=0, n_neighbors=min(15, E - 1), metric="cosine", n_jobs=1)
        projections["UMAP"] = _coordinates(flat.fit_transform(keys_SED.reshape(S * E, D)).reshape(S, E, 2))
    return projections


def _coordinates(plane_SE2: np.ndarray) -> dict[str, list[list[float | None]]]:
    return {name: [plain(xy_E2[:, axis], 4) for xy_E2 in plane_SE2] for axis, name in enumerate("xy")}
