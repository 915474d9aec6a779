"""Chooses the clips to hold out for evaluation: the same share of every class, whole groups only.

    groups  {key: how many of its clips have each label}    ->  keys that are held out

A key is the checksum of a sound or a group of sounds. The choice therefore depends only on the
sounds, not on their order, shards or location.
"""

from collections import Counter
from collections.abc import Mapping
from typing import Any

NO_LABEL = object()  # for clips without labels in a multi-label set


def hold_out(groups: Mapping[int, Counter], fraction: float) -> set[int]:
    """Choose groups so that each class comes as close as possible to its share.

    Rare classes choose first, groups in the order of their keys. A group is held out if that brings
    the classes of its clips, taken together, closer to their shares (a greedy form of iterative
    stratification: Sechidis et al., ECML PKDD 2011). A class with two or more groups gets one in
    both parts, if its groups' other classes allow it; a class with one group is only trained on.

    Args:
        groups: the clips of each label in a group.
        fraction: of each class's clips to hold out.
    """
    totals: Counter = Counter()
    members: dict[Any, list[int]] = {}
    for key in sorted(groups):
        totals.update(groups[key])
        for label in groups[key]:
            members.setdefault(label, []).append(key)
    training = {label: len(keys) for label, keys in members.items()}  # groups left for training
    held: Counter = Counter()
    chosen: set[int] = set()

    def can_take(key: int) -> bool:
        return key not in chosen and all(training[label] > 1 for label in groups[key])

    def take(key: int) -> None:
        chosen.add(key)
        held.update(groups[key])
        for label in groups[key]:
            training[label] -= 1

    def cost(key: int) -> float:
        """How much farther from their shares this group moves the classes; negative: closer."""
        return sum(
            abs(held[label] + clips - fraction * totals[label])
            - abs(held[label] - fraction * totals[label])
            for label, clips in groups[key].items()
        )

    by_rarity = sorted(members, key=lambda label: (totals[label], str(label)))
    for label in by_rarity:
        for key in members[label]:
            if held[label] >= fraction * totals[label]:
                break
            if can_take(key) and cost(key) < 0:
                take(key)
    for label in by_rarity:
        if not held[label] and (possible := [key for key in members[label] if can_take(key)]):
            take(min(possible, key=lambda key: (cost(key), key)))
    return chosen
