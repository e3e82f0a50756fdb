"""One decision on all ranks."""

import pytest

from lopd_megatron.effopd.agreement import agree


def test_the_deciding_rank_needs_a_score() -> None:
    with pytest.raises(ValueError, match="compute the score"):
        agree(None)
