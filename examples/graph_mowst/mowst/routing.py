"""The routing of nodes to experts as an equipoise Profile: one layer, two experts, a scenario for each class of node.

Shapes: N nodes, R test nodes, S scenarios (classes), E experts (0 weak, 1 strong).
"""

from __future__ import annotations

import hashlib
from typing import Any

import numpy as np
import torch
from torch import nn

from equipoise import __version__, metrics
from equipoise.artifacts import LayerFacts, ModelFacts, Profile, Source
from equipoise.errors import ProfileError
from mowst.graphs import Graph
from mowst.mixture import Mowst, MowstStar, Parts

EXPERTS = ("weak", "strong")


def record(name: str, model: Mowst, parts: Parts, graph: Graph, nodes: torch.Tensor, seed: int) -> Profile:
    """The Profile of the traffic that some nodes are.

    Mowst sends a node to one expert (top-1), drawn by its confidence; that selection has gate weight 1. Mowst-star sends every
    node to both (top-2), with weights C and 1 - C: its counts are even by design, and its gate mass tells the division.
    The model's experts differ in shape, which a Profile's layer cannot say, so it gives no shapes: bytes are not counted.

    Args:
        name: of the model, for people.
        model: that was trained.
        parts: what it says of all nodes.
        graph: the graph.
        nodes: [R] that are served.
        seed: of Mowst's draws.

    Raises:
        ProfileError: no nodes were given.
    """
    if not len(nodes):
        raise ProfileError("no nodes were given; give the test nodes of a split.")
    confidence_R = parts.confidence_N.detach()[nodes].double().numpy()
    labels_R = graph.labels_N[nodes].numpy()
    classes = np.unique(labels_R)
    if isinstance(model, MowstStar):
        selected_RE = np.ones((len(nodes), 2), np.int64)
        weight_RE = np.stack([confidence_R, 1 - confidence_R], 1)
    else:
        weak_R = np.random.default_rng(seed).random(len(nodes)) < confidence_R
        selected_RE = np.stack([weak_R, ~weak_R], 1).astype(np.int64)
        weight_RE = selected_RE.astype(np.float64)
    member_SR = labels_R[None] == classes[:, None]
    counts = np.zeros((len(classes), 2, 1, 2), np.int64)
    counts[:, 0, 0] = member_SR @ selected_RE  # the one pass over a graph is what a prefill is to a text
    return Profile(
        model=_facts(name, model),
        source=Source(
            origin="mowst",
            scenarios=tuple(f"{graph.name} class {c}" for c in classes),
            text_sha256=hashlib.sha256(nodes.numpy().tobytes()).hexdigest(),
            options={"graph": graph.name, "nodes": "test", "seed": seed, "experts": list(EXPERTS)},
            equipoise_version=__version__,
        ),
        counts=counts,
        gate_mass=(member_SR @ weight_RE)[:, None],
        tokens=member_SR.sum(1).astype(np.int64),
        windows=np.zeros((0, 1, 2), np.int64),
        window_scenario=np.zeros(0, np.int64),
    )


def _facts(name: str, model: nn.Module) -> ModelFacts:
    digest = hashlib.sha256()
    for key, value in sorted(model.state_dict().items()):
        digest.update(key.encode())
        digest.update(value.numpy().tobytes())
    layer = LayerFacts(
        path="experts", model_layer=0, num_experts=2, top_k=2 if isinstance(model, MowstStar) else 1, matrices=()
    )
    return ModelFacts(name=name, model_type="mowst", dtype="fp32", fingerprint=digest.hexdigest(), layers=(layer,))


def balance(profile: Profile) -> dict[str, Any]:
    """How evenly a Profile's nodes are divided between the experts, over all and by class.

    Where a node reaches one expert the load is selections; where it reaches both it is gate mass.

    Args:
        profile: that `record` made.
    """
    layer = profile.model.layers[0]
    load_SE = (profile.scenario_load if layer.top_k == 1 else profile.gate_mass)[:, 0].astype(np.float64)
    return {
        "weak_share": float(load_SE[:, 0].sum() / load_SE.sum()),
        "lis": float(metrics.lis(load_SE.sum(0))),
        "classes": list(profile.source.scenarios),
        "class_weak_share": (load_SE[:, 0] / load_SE.sum(1)).tolist(),
        "class_lis": metrics.lis(load_SE).tolist(),
        "class_divergence": metrics.jensen_shannon(load_SE, np.broadcast_to(load_SE.sum(0), load_SE.shape)).tolist(),
    }
