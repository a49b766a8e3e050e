"""AdamW whose memory lies on the host: --offload-optimizer.

AdamW keeps two numbers for every one it trains, 8 bytes in float32. Of an adapter that is little, of a whole model twice its
weights; both are needed only while a step is taken. So they stay in the host's memory, and each parameter's come over for its own
update and go back. What is computed is AdamW's on the device: a run may go on with or without.

QLoRA's paged optimizers (2305.14314 §3) do the same by the driver, page by page and only under pressure, which plain torch cannot.
"""

from __future__ import annotations

import torch
from torch.optim.adamw import adamw


class HostAdamW(torch.optim.AdamW):
    """torch.optim.AdamW with `exp_avg` and `exp_avg_sq` on the CPU, pinned where the device can copy from pinned memory faster."""

    def __init__(self, groups, *, fused: bool = False, **options):
        """`fused` is for the caller's ease: with memory that comes and goes there is nothing to fuse."""
        super().__init__(groups, **options)

    @torch.no_grad()
    def step(self, closure=None) -> None:
        for group in self.param_groups:
            beta1, beta2 = group["betas"]
            for parameter in (parameter for parameter in group["params"] if parameter.grad is not None):
                state = self.state[parameter]
                if not state:
                    state |= {"step": torch.zeros(())} | {key: self._host_zeros(parameter) for key in ("exp_avg", "exp_avg_sq")}
                average, square = (state[key].to(parameter.device, non_blocking=True) for key in ("exp_avg", "exp_avg_sq"))
                adamw([parameter], [parameter.grad], [average], [square], [], [state["step"]], foreach=False, amsgrad=False, beta1=beta1,
                      beta2=beta2, lr=group["lr"], weight_decay=group["weight_decay"], eps=group["eps"], maximize=False)  # fmt: skip
                if parameter.device.type != "cpu":
                    state["exp_avg"].copy_(average)
                    state["exp_avg_sq"].copy_(square)

    @staticmethod
    def _host_zeros(parameter: torch.Tensor) -> torch.Tensor:
        return torch.zeros(parameter.shape, dtype=parameter.dtype, pin_memory=parameter.device.type == "cuda")
