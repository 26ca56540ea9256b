"""The method: the paper in NumPy and torch.

- `quantiles`: quantile rewards from reference rewards, with bounds
- `transforms`: the function f of the quantile reward, with its partition function
- `partition`: log Z in its continuous, finite and empirical forms
- `losses`: QRPO, DPO, REBEL and SimPO as pure functions
- `optimum`: the exact optimum of the objective
- `theory`: what a beta and a number of reference samples give; what `qrpo theory` shows
- `quadrature`: integrals over quantiles in the log domain
- `arrays`: conversion between NumPy and torch
"""
