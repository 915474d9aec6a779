"""Which clips to hold out for evaluation: the same share of every class, groups whole.

    groups  {key: how many of its clips have each label}    ->  keys that are held out

A key stands for a sound or a group of sounds, and is a checksum. So the choice depends on the
sounds alone: not on their order, on shards, or on where they are stored.
"""

from collections import Counter
from collections.abc import Mapping
from typing import Any

NO_LABEL = object()  # of clips that have none, in a multi-label set


def hold_out(groups: Mapping[int, Counter], fraction: float) -> set[int]:
    """Choose groups so that each class comes as close as it can to its share.

    Rare classes choose first, groups in the order of their keys; one is taken when that brings the
    classes of its clips, together, closer to their shares (a greedy form of iterative
    stratification: Sechidis et al., ECML PKDD 2011). A class of two groups or more has one in both
    parts wherever its groups' other classes allow it; of a class with one group, all is for
    training.

    Args:
        groups: the clips of each label in a group.
        fraction: of the clips of each class, to be held out.
    """
    totals: Counter = Counter()
    members: dict[Any, list[int]] = {}
    for key in sorted(groups):
        totals.update(groups[key])
        for label in groups[key]:
            members.setdefault(label, []).append(key)
    training = {label: len(keys) for label, keys in members.items()}  # groups left for it
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
        """How much farther from their shares the classes are with it; negative: closer."""
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
