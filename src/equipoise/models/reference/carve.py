"""Carve the neurons of a dense gated feed-forward layer into one shared and E routed experts, without training.

What a neuron does on calibration tokens decides where it goes: neurons that are always busy form the shared expert,
the others are grouped by the tokens they answer to; a router is fitted in closed form to predict which groups a token
needs; at last the down projection is fitted anew to make up for the groups that a token does not visit.
Splitting a feed-forward layer into experts follows LLaMA-MoE (arXiv:2406.16554); shared experts by activation rate and
balanced clustering of the rest by linear assignment follow CMoE (arXiv:2502.04416). The router and the refit are ours.

Shapes: T tokens, D model width, N neurons, S shared neurons, M = N - S others, E experts, F = M / E neurons of an expert.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.optimize import linear_sum_assignment
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Recipe:
    """What to carve and how.

    Attributes:
        shared: S, neurons of the shared expert.
        experts: E, number of routed experts; they divide the remaining neurons evenly.
        top_k: routed experts that a token visits.
        temperature: scale of the router's logits; small means gates near 1 / top_k, which the refit then relies on.
        router_ridge: ridge of the router's regression, relative to the mean square of its inputs.
        refit_ridge: ridge of the refit, relative to the mean square of the neurons' activations.
        cluster_tokens: calibration tokens, evenly spaced, that the clustering looks at.
        kmeans_rounds: rounds of balanced k-means.
        alternations: rounds of choosing the tokens' experts and the experts' neurons by turns.
        seed: of the k-means start.
    """

    shared: int = 1152
    experts: int = 16
    top_k: int = 4
    temperature: float = 0.05
    router_ridge: float = 1e-2
    refit_ridge: float = 1.0
    cluster_tokens: int = 2560
    kmeans_rounds: int = 6
    alternations: int = 4
    seed: int = 0


@dataclass(frozen=True, slots=True, eq=False)
class Carving:
    """Where each neuron went, who decides, and what the neurons now add to the output.

    Attributes:
        shared: [S] neurons of the shared expert, ascending.
        experts: [E, F] neurons of each routed expert, ascending.
        router: [E, D] weights of the router; a token's logits are x router'.
        down: [D, N] down projection in the order of the dense layer, for gates that sum to top_k over a token's experts.
    """

    shared: Tensor
    experts: Tensor
    router: Tensor
    down: Tensor


def carve(x_TD: Tensor, hidden_TN: Tensor, down_DN: Tensor, weight_T: Tensor, recipe: Recipe) -> Carving:
    """Carve one layer, given what its neurons do on calibration tokens.

    Args:
        x_TD: inputs of the layer.
        hidden_TN: activations of its neurons, silu(x gate') * (x up').
        down_DN: its down projection.
        weight_T: weight of each token's error, in practice 1 / |residual stream after the layer|^2, which keeps the few
            tokens with massive activations from deciding everything.
        recipe: sizes and settings.

    Raises:
        ValueError: sizes that do not divide the layer (a mistake of the programmer).
    """
    neurons = hidden_TN.shape[1]
    if not 0 < recipe.shared < neurons or (neurons - recipe.shared) % recipe.experts:
        raise ValueError(f"{neurons} neurons less {recipe.shared} shared ones do not divide into {recipe.experts} experts")
    energy_TN = neuron_energy(hidden_TN, down_DN, weight_T)
    shared_S, others_M = split_shared(energy_TN, recipe.shared)
    rows = torch.linspace(0, len(x_TD) - 1, min(recipe.cluster_tokens, len(x_TD))).long()
    groups_EF = cluster_neurons(energy_TN[rows][:, others_M].numpy(), recipe)
    experts_EF = others_M[torch.from_numpy(groups_EF)]
    need_TE = expert_norms(hidden_TN, down_DN, experts_EF) * weight_T.sqrt()[:, None]
    router_ED = fit_router(x_TD, need_TE, recipe)
    gate_TN = neuron_gates(route(x_TD, router_ED, recipe.top_k), experts_EF, neurons)
    return Carving(shared_S, experts_EF, router_ED, refit_down(hidden_TN, gate_TN, down_DN, weight_T, recipe.refit_ridge))


def neuron_energy(hidden_TN: Tensor, down_DN: Tensor, weight_T: Tensor) -> Tensor:
    """Weighted squared norm of what each neuron adds to the output: w_t h_tj^2 |down_j|^2, [T, N]."""
    return hidden_TN.square() * down_DN.square().sum(0) * weight_T[:, None]


def split_shared(energy_TN: Tensor, shared: int) -> tuple[Tensor, Tensor]:
    """Indices of the `shared` neurons with the largest mean amplitude, and of the others, both ascending."""
    busiest = energy_TN.sqrt().mean(0).argsort(descending=True, stable=True)
    return busiest[:shared].sort().values, busiest[shared:].sort().values


def cluster_neurons(energy_TM: NDArray[np.float32], recipe: Recipe) -> NDArray[np.int64]:
    """Group neurons that answer to the same tokens, equally many in each group.

    Balanced k-means on the neurons' normalized amplitudes over tokens, then turns of (a) giving each token the top-k
    groups with most energy and (b) regrouping the neurons so that as much energy as possible lies in groups visited.

    Args:
        energy_TM: energy of each neuron to be grouped on each token.
        recipe: number of groups, top-k, rounds and seed.

    Returns:
        [E, F] indices into the M neurons, ascending in each group.
    """
    amplitude_MT = np.sqrt(energy_TM.T)
    amplitude_MT /= np.maximum(np.linalg.norm(amplitude_MT, axis=1, keepdims=True), 1e-20)
    start = np.random.default_rng(recipe.seed).choice(len(amplitude_MT), recipe.experts, replace=False)
    centre_ET = amplitude_MT[start]
    for _ in range(recipe.kmeans_rounds):
        groups_EF = assign_balanced(amplitude_MT @ centre_ET.T)
        centre_ET = amplitude_MT[groups_EF].mean(1)
        centre_ET /= np.maximum(np.linalg.norm(centre_ET, axis=1, keepdims=True), 1e-20)
    for _ in range(recipe.alternations):
        group_TE = energy_TM[:, groups_EF].sum(-1)
        visited_TE = np.zeros_like(group_TE)
        np.put_along_axis(visited_TE, np.argpartition(-group_TE, recipe.top_k - 1, axis=1)[:, : recipe.top_k], 1.0, axis=1)
        regrouped_EF = assign_balanced(energy_TM.T @ visited_TE)
        if np.array_equal(regrouped_EF, groups_EF):
            break
        groups_EF = regrouped_EF
    return groups_EF


def assign_balanced(score_ME: NDArray[np.float32]) -> NDArray[np.int64]:
    """The assignment of M items to E groups of M / E that has the largest total score, as [E, M / E] ascending indices."""
    items, groups = score_ME.shape
    size = items // groups
    row, column = linear_sum_assignment(np.repeat(score_ME, size, axis=1), maximize=True)
    group_M = np.empty(items, dtype=np.int64)
    group_M[row] = column // size
    return np.argsort(group_M, kind="stable").reshape(groups, size)


def expert_norms(hidden_TN: Tensor, down_DN: Tensor, experts_EF: Tensor) -> Tensor:
    """Norm of each expert's output on each token, [T, E]; by Gram matrices, so no [T, E, D] array is made."""
    columns = []
    for neurons_F in experts_EF:
        hidden_TF, down_DF = hidden_TN[:, neurons_F], down_DN[:, neurons_F]
        columns.append(((hidden_TF @ (down_DF.T @ down_DF)) * hidden_TF).sum(1))
    return torch.stack(columns, 1).clamp_min(0).sqrt()


def fit_router(x_TD: Tensor, target_TE: Tensor, recipe: Recipe) -> Tensor:
    """Ridge regression without bias of each expert's importance on the layer's input, [E, D].

    Args:
        x_TD: inputs.
        target_TE: how much each token needs each expert; only its relative size matters.
        recipe: `router_ridge` and `temperature`.
    """
    x = x_TD.double()
    gram_DD = x.T @ x
    gram_DD.diagonal().add_(recipe.router_ridge * gram_DD.diagonal().mean())
    weights_DE = torch.linalg.solve(gram_DD, x.T @ (target_TE / target_TE.mean()).double())
    return (recipe.temperature * weights_DE.T).to(x_TD.dtype)


def route(x_TD: Tensor, router_ED: Tensor, top_k: int) -> Tensor:
    """Gates as the carved model computes them: softmax, top-k, normalized to sum 1; [T, E] with zeros off the top-k."""
    probability_TE = (x_TD @ router_ED.T).float().softmax(-1)
    value_TK, expert_TK = probability_TE.topk(top_k, dim=-1)
    return torch.zeros_like(probability_TE).scatter_(1, expert_TK, value_TK / value_TK.sum(-1, keepdim=True))


def neuron_gates(gate_TE: Tensor, experts_EF: Tensor, neurons: int) -> Tensor:
    """The factor on each neuron's activation, [T, N]: top_k times its expert's gate; 1 for shared neurons."""
    top_k = (gate_TE[0] > 0).sum()
    factor_TN = torch.ones(len(gate_TE), neurons)
    factor_TN[:, experts_EF.flatten()] = (top_k * gate_TE).repeat_interleave(experts_EF.shape[1], dim=1)
    return factor_TN


def refit_down(hidden_TN: Tensor, gate_TN: Tensor, down_DN: Tensor, weight_T: Tensor, ridge: float) -> Tensor:
    """Down projection that brings the gated neurons as near to the dense layer's output as a linear map can.

    Minimizes sum_t w_t |A_t W' - H_t down'|^2 + ridge * mean(diag) * |W - down|^2 with A = gates * H.

    Args:
        hidden_TN: H, activations of all neurons.
        gate_TN: factor that each neuron's activation gets, 0 where its expert is not visited.
        down_DN: the dense layer's down projection, to which the ridge pulls.
        weight_T: weight of each token.
        ridge: relative to the mean diagonal of A' w A.

    Returns:
        [D, N] the new down projection.
    """
    root_T1 = weight_T.sqrt()[:, None]
    active_TN = hidden_TN * gate_TN * root_T1
    missing_TD = (hidden_TN * root_T1 - active_TN) @ down_DN.T
    gram_NN = active_TN.T @ active_TN
    gram_NN.diagonal().add_(ridge * gram_NN.diagonal().mean())
    factor = torch.linalg.cholesky(gram_NN.double())
    delta_ND = torch.cholesky_solve((active_TN.T @ missing_TD).double(), factor)
    return down_DN + delta_ND.T.to(down_DN.dtype)
