"""Muon: momentum whose update for each weight matrix is made orthogonal.

Jordan et al. 2024, https://kellerjordan.github.io/posts/muon/
"""

import torch


def newton_schulz(matrices, dtype, steps=4):
    """Approximate the orthogonal factor U V^T of each matrix U S V^T in a stack (K, m, n), computed in `dtype`.

    Uses the quintic Newton-Schulz iteration of Jordan et al. 2024 with its coefficients; singular values end near 1.
    Rows and columns of zeros stay zero, so matrices of several shapes can share one padded stack.
    """
    a, b, c = 3.4445, -4.7750, 2.0315
    x = (matrices / (matrices.norm(dim=(1, 2), keepdim=True) + 1e-7)).to(dtype)
    for _ in range(steps):
        square = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(square, square, square, beta=b, alpha=c), x, beta=a)
    return x


def fix_tensor_norm(matrices, dtype):
    """Scale each matrix of a stack (K, m, n), m at most n, to the Frobenius norm of its orthogonal factor, sqrt(m).

    What `newton_schulz` makes has .7 to 1.1 times that norm. Rows of zeros are padding and do not count.
    """
    rows = matrices.any(2).sum(1)[:, None, None]
    return matrices * (rows.sqrt() / (matrices.norm(dim=(1, 2), keepdim=True) + 1e-7))


def fix_filter_norm(matrices, dtype):
    """Scale each row of a stack (K, m, n) to norm 1; rows of zeros stay zero."""
    return matrices / (matrices.norm(dim=2, keepdim=True) + 1e-7)


class Muon(torch.optim.Optimizer):
    """Take Muon's step for groups with `use_muon`, and SGD's with Nesterov momentum for the others.

    params        parameter groups of `models.param_groups`. A convolution (out, in, k, k) counts as an (out, in k k)
                  matrix; its weight decay is decoupled: a share lr * weight_decay of the weight goes in each step.
    lr            learning rate: a float, or a tensor on the parameters' device, which can change inside a CUDA graph
    rest_lr       a multiplier: the other groups step with rest_lr * lr and do not decay
    dtype         type in which the Newton-Schulz iteration computes
    direction     makes a step of the momentum (K, m, n): newton_schulz, fix_tensor_norm or fix_filter_norm

    All matrices are orthogonalized at once, in one zero-padded stack, where torch.optim.Muon and timm take one after
    another. As in torch.optim, `found_inf` may hold a tensor that keeps the parameters as they are unless it is 0.
    ValueError for a group with `use_muon` whose parameters are not convolutions.
    """

    def __init__(
        self, params, lr=0.03, momentum=0.95, weight_decay=0.0, rest_lr=10, dtype=torch.float32, direction=newton_schulz
    ):
        self.rest_lr, self.dtype, self.direction, self.found_inf = rest_lr, dtype, direction, None
        self.flat = []  # per group: the momentum of all its parameters in one row; for matrices, a stack and indices
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay, "use_muon": False})

    def add_param_group(self, param_group):
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        params, device = group["params"], group["params"][0].device
        padded = None
        if group["use_muon"]:
            wrong = [tuple(p.shape) for p in params if p.ndim != 4]
            if wrong:
                raise ValueError(f"use_muon is set for a parameter of shape {wrong[0]}; give weights (out, in, k, k)")
            rows, columns = max(len(p) for p in params), max(p[0].numel() for p in params)
            stack = torch.zeros(len(params), rows, columns, device=device)
            numbers = torch.arange(stack.numel(), device=device).view_as(stack)
            indices = [part[: len(p), : p[0].numel()].flatten() for part, p in zip(numbers, params, strict=True)]
            padded = stack, torch.cat(indices)
        momentum = torch.zeros(sum(p.numel() for p in params), device=device)
        self.flat.append((momentum, padded))
        for p, buffer in zip(params, split_like(momentum, params), strict=True):
            self.state[p]["momentum_buffer"] = buffer

    def load_state_dict(self, state_dict):
        super().load_state_dict(state_dict)
        for group, (momentum, _) in zip(self.param_groups, self.flat, strict=True):
            for p, buffer in zip(group["params"], split_like(momentum, group["params"]), strict=True):
                self.state[p]["momentum_buffer"] = buffer.copy_(self.state[p]["momentum_buffer"])

    @torch.no_grad()
    def step(self, closure=None):
        """Update all parameters once; return the closure's loss, if a closure is given."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group, (momentum, padded) in zip(self.param_groups, self.flat, strict=True):
            params, lr = group["params"], group["lr"]
            if self.found_inf is not None:
                lr = lr * (self.found_inf == 0)
            update = torch.cat([flatten(p.grad) for p in params])
            momentum.mul_(group["momentum"]).add_(update)
            update.add_(momentum, alpha=group["momentum"])
            if padded:
                stack, indices = padded
                stack.view(-1)[indices] = update
                update.copy_(self.direction(stack, self.dtype).view(-1)[indices])
                torch._foreach_mul_(params, 1 - lr * group["weight_decay"])
            else:
                update.mul_(self.rest_lr)
            update.mul_(lr)
            if self.found_inf is not None:
                update.masked_fill_(self.found_inf > 0, 0)  # 0 * nan would be nan
            torch._foreach_sub_(params, split_like(update, params))
        return loss


def flatten(tensor):
    """Flatten a tensor in the order in which it lies in memory: (out, in, k, k) as (out, k, k, in), channels last."""
    return tensor.permute(0, 2, 3, 1).flatten() if tensor.ndim == 4 else tensor.flatten()


def split_like(row, params):
    """Split a row of values into views that are shaped like `params`, each as `flatten` orders it."""
    views = []
    for part, p in zip(row.split([p.numel() for p in params]), params, strict=True):
        if p.ndim == 4:
            out, channels, height, width = p.shape
            views.append(part.view(out, height, width, channels).permute(0, 3, 1, 2))
        else:
            views.append(part.view_as(p))
    return views
