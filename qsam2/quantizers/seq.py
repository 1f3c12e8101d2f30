"""SEQ: ParetoQ's stretched elastic quantization (Liu et al., arXiv 2502.02631).

w^ = alpha ([clip(w/alpha; -1, 1) n - 1/2] + 1/2) / n with n = 2^(b-1), alpha learned per row with LSQ's gradients: LSQ
on the mid-rise grid of s = alpha/n. The paper uses it for 2 bits, and LSQ unchanged from 3 bits on, as `grid=auto`
does.
The method equals `lsq` with its default grids, restricted to weights.
Ours: alpha starts at the least error, since max|w| (the authors' code, `range=minmax`) is too wide for heavy-tailed
rows; log s is learned; values up to alpha are inside (the code: up to 0.99 alpha); N of the gradient's scale is that of
a row.
"""

from __future__ import annotations

from qsam2.quantizers.lsq import LSQQuantizer
from qsam2.quantizers.registry import register
from qsam2.recipe.quantizer_specs import SEQSpec


@register(SEQSpec)
class SEQQuantizer(LSQQuantizer):
    """Learned `log_scale` (C,), the logarithm of alpha/n."""

    spec: SEQSpec  # type: ignore[assignment]
