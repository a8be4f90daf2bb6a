"""A loss term of one's own. Train with it: add `margin: 0.5` to the objective of a recipe, and name this file.

clip-rd-edge recipe clip-rd > mine.yaml
clip-rd-edge distill --recipe mine.yaml --terms examples/own_term.py …
"""

from torch import Tensor

from clip_rd_edge.losses.terms import Products, term

MARGIN = 0.2


@term("margin", needs={"pairs", "images"}, matches=True)
def margin(p: Products) -> Tensor:
    """Hinge loss over captions (Faghri et al. 2018): by how much others exceed an image's own one, mean over B."""
    own = (p.s_v * p.s_t).sum(1)[p.rows]
    cosines = p.s_v[p.rows] @ p.s_t.T
    excess = (cosines - own[:, None] + MARGIN).clamp(min=0)
    return (excess.sum() - MARGIN * len(own)) / p.pairs  # an image's own caption exceeds itself by the margin
