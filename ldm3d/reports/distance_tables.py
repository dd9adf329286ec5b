"""Distances of latents as tables: a line for each case, each subject, each pair of groups.

A row describes a case: "case", "group" (first or other), "subject", "class", "split"; "" = unknown. All
figures follow from two matrices of the N cases: gram (N, N), the inner products of their latents, and apart
(N, N), their distances (projections.py).
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from .projections import to_centre

Row = dict[str, str]


def _mean(values: Tensor) -> float | None:
    return float(values.mean()) if values.numel() else None


def _between_means(gram: Tensor, a: Tensor, b: Tensor) -> float:
    """Distance of the mean of the cases a to the mean of the cases b, two masks (N,):
    sqrt(|mean_a|^2 + |mean_b|^2 - 2 <mean_a, mean_b>)."""
    squared = gram[a][:, a].mean() + gram[b][:, b].mean() - 2 * gram[a][:, b].mean()
    return float(squared.clamp(min=0).sqrt())


def case_table(rows: list[Row], positions: Tensor, gram: Tensor, apart: Tensor) -> list[dict[str, Any]]:
    """Of each case: its row, its position (x, y) in the map, its distance to the centre of the first group,
    and the nearest other case of the first group with its distance."""
    first = torch.tensor([row["group"] == "first" for row in rows])
    centre = to_centre(gram, first)
    others = apart.clone().fill_diagonal_(math.inf)
    others[:, ~first] = math.inf
    nearest = others.min(1)
    return [
        {
            **row,
            "x": float(positions[i, 0]),
            "y": float(positions[i, 1]),
            "to_centre": float(centre[i]),
            "nearest": float(nearest.values[i]),
            "nearest_case": rows[int(nearest.indices[i])]["case"],
        }
        for i, row in enumerate(rows)
    ]


def subject_table(rows: list[Row], gram: Tensor, apart: Tensor) -> list[dict[str, Any]]:
    """Of each subject in each group; the subject farthest from the centre of its group comes first.

    to_centre: mean distance of the subject's cases to the centre of the group; within: mean distance of two
    of its cases; to_other_group: mean distance of its cases here to its cases in the other group; centres:
    distance of the mean of its cases here to the mean of its cases there. None where there are no such cases.
    """
    table = []
    for group in dict.fromkeys(row["group"] for row in rows):
        in_group = torch.tensor([row["group"] == group for row in rows])
        centre = to_centre(gram, in_group)
        for subject in dict.fromkeys(row["subject"] for row in rows if row["group"] == group):
            of_subject = torch.tensor([row["subject"] == subject for row in rows])
            here, there = of_subject & in_group, of_subject & ~in_group
            pairs, count = apart[here][:, here], int(here.sum())
            table.append(
                {
                    "group": group,
                    "subject": subject,
                    "cases": count,
                    "to_centre": float(centre[here].mean()),
                    "within": float(pairs.sum()) / (count * (count - 1)) if count > 1 else None,
                    "to_other_group": _mean(apart[here][:, there]),
                    "centres": _between_means(gram, here, there) if there.any() else None,
                }
            )
    return sorted(table, key=lambda line: (line["group"] != "first", -line["to_centre"]))


def group_table(groups: list[str], gram: Tensor, apart: Tensor) -> list[dict[str, Any]]:
    """Of each pair of groups (a, b), also of a group with itself. groups: the group of each case.

    pairs: mean distance of a case of a to a case of b; nearest: mean distance of a case of a to the nearest
    case of b; centres: distance of the two means. No case is compared with itself.
    """
    table, others = [], apart.clone().fill_diagonal_(math.inf)
    masks = {name: torch.tensor([group == name for group in groups]) for name in dict.fromkeys(groups)}
    for a, in_a in masks.items():
        for b, in_b in masks.items():
            block = others[in_a][:, in_b]
            nearest = block.min(1).values
            table.append(
                {
                    "a": a,
                    "b": b,
                    "cases_a": int(in_a.sum()),
                    "cases_b": int(in_b.sum()),
                    "centres": _between_means(gram, in_a, in_b),
                    "pairs": _mean(block[block.isfinite()]),
                    "nearest": _mean(nearest[nearest.isfinite()]),
                }
            )
    return table
