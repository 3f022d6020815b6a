"""Which cases `make test` leaves to `make test-all`."""

from collections import Counter
from collections.abc import Hashable, Sequence
from itertools import combinations


def covering(cases: Sequence[Sequence[Hashable]], strength: int) -> set[int]:
    """Indices of a few of the cases, such that any `strength` values that occur together in some
    case do so in one of these."""
    tuples = [{*combinations(enumerate(case), strength)} for case in cases]
    missing, chosen, used = set().union(*tuples), set(), Counter()
    while missing:
        best = max(
            range(len(cases)),
            key=lambda i: (len(tuples[i] & missing), -sum(used[v] for v in enumerate(cases[i]))),
        )
        chosen.add(best)
        missing -= tuples[best]
        used.update(enumerate(cases[best]))
    return chosen
