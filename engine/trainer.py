"""The training step, from the indices of a batch to the new weights, and its epochs."""

import contextlib
import functools
import gc
import os

import torch
import torch.nn.functional as F
from torch.nn.parameter import is_lazy

import models
from engine import fast
from engine.data import crop_and_flip, normalize
from engine.muon import Muon, fix_filter_norm, fix_tensor_norm, newton_schulz

LOSS_SCALE = 128  # keeps gradients within float16's range; a power of two, so that dividing by it is exact


def muon(groups, lr, momentum, dtype, **options):
    return Muon(groups, lr, momentum, dtype=dtype, **options)


def sgd(groups, lr, momentum, dtype):
    # Of PyTorch's kinds only the fused one reads a learning rate on the device without waiting for it.
    return with_state(torch.optim.SGD(groups, lr, momentum, nesterov=True, fused=True), "momentum_buffer")


class SGDW(torch.optim.SGD):
    """SGD with decoupled weight decay: a share lr * decay of the weight goes in each step (Loshchilov & Hutter 2019).

    https://arxiv.org/abs/1711.05101
    """

    def __init__(self, groups, lr, momentum):
        self.found_inf = None
        super().__init__(groups, lr, momentum, nesterov=True, fused=True)

    @torch.no_grad()
    def step(self, closure=None):
        decays = [group["weight_decay"] for group in self.param_groups]
        for group, decay in zip(self.param_groups, decays, strict=True):
            lr = group["lr"] * (1 if self.found_inf is None else self.found_inf == 0)
            torch._foreach_mul_(group["params"], 1 - lr * decay)
            group["weight_decay"] = 0  # of SGD's own, in the gradient
        try:
            return super().step(closure)
        finally:
            for group, decay in zip(self.param_groups, decays, strict=True):
                group["weight_decay"] = decay


def sgdw(groups, lr, momentum, dtype):
    return with_state(SGDW(groups, lr, momentum), "momentum_buffer")


def adamw(groups, lr, momentum, dtype):
    optimizer = torch.optim.AdamW(groups, lr, (momentum, 0.999), capturable=lr.is_cuda, fused=True)
    return with_state(optimizer, "step", "exp_avg", "exp_avg_sq")


def with_state(optimizer, *names):
    """Create the state that PyTorch creates in the first step, so that a checkpoint can be held to its form."""
    for p in (p for group in optimizer.param_groups for p in group["params"]):
        optimizer.state[p] = {name: p.new_zeros(()) if name == "step" else torch.zeros_like(p) for name in names}
    return optimizer


def with_strides(tensor, strides):
    """Return a tensor with these strides, itself where it has them: fused optimizers on CPUs take memory as it lies."""
    if tensor.stride() == strides:
        return tensor
    if all(own == other for own, other, size in zip(tensor.stride(), strides, tensor.shape, strict=True) if size > 1):
        return tensor
    return torch.empty_strided(tensor.shape, strides, dtype=tensor.dtype, device=tensor.device).copy_(tensor)


@contextlib.contextmanager
def layout_kept(net):
    """Restore the memory layout of weights and gradients in the end, also after an error; buffers become contiguous.

    Without that, `view` fails, and with it pruning.
    """
    before = [(p, torch.empty_like(p).stride()) for p in net.parameters() if not is_lazy(p)]
    try:
        yield
    finally:
        net.to(memory_format=torch.contiguous_format)
        for p, strides in before:
            p.data = with_strides(p.data, strides)
            if p.grad is not None:
                p.grad = with_strides(p.grad, strides)


# Decay is decoupled but in sgd, where it is an L2 term in the gradient. All parameters have one learning rate but in
# muon, where scales, shifts and c11 have ten times as much.
OPTIMIZERS = {
    "muon": muon,
    "sgd": sgd,
    "sgdw": sgdw,
    "adamw": adamw,
    "muon-one-rate": functools.partial(muon, rest_lr=1),
    "tensor-norm": functools.partial(muon, rest_lr=1, direction=fix_tensor_norm),
    "filter-norm": functools.partial(muon, rest_lr=1, direction=fix_filter_norm),
}
DEFINED = dict(OPTIMIZERS)  # as this file has them, whatever is added at run time


def schedule(steps, peak, warmup=0.2, device=None):
    """Return the learning rate of each step, (steps,): linear warmup to `peak`, then linear decay to nearly 0.

    warmup  share of the steps, above 0 and below 1
    """
    progress = torch.arange(1, steps + 1, device=device) / (steps + 1)
    return peak * torch.minimum(progress / warmup, (1 - progress) / (1 - warmup))


def takes_fused_step(net, device, fused=None):
    """Return whether training `net` on `device` takes the step of engine.kernels.

    fused  False: no. True: yes, or ValueError, which says why not. None: where it can; on a GPU, print once why not
    """
    if fused is False or (fused is None and device.type != "cuda"):
        return False
    reason = reason_against_fused_step(net, device)
    if reason and fused:
        raise ValueError(f"there is no fused step here: {reason}")
    if reason:
        print_once(f"training without the fused step: {reason}")
    return not reason


def reason_against_fused_step(net, device):
    """Return why engine.kernels can't train `net` on `device`, in a few words, or "" where it can."""
    if device.type != "cuda" and os.environ.get("TRITON_INTERPRET") != "1":
        return "it needs a GPU"
    if torch.version.hip:
        return "it needs an NVIDIA GPU"
    try:
        from engine import kernels
    except ImportError as error:
        return f"Triton can't be imported ({error})"
    return kernels.reason_against(net) or kernels.reason_against_device(device)


def check_kind(net):
    """Raise TypeError, in one line, unless `net` is a models.Net whose c11 is a Conv2d.

    ValueError where two parameters share memory, since moving the net, to a GPU or to channels last, would end that.
    """
    if not isinstance(net, models.Net):
        raise TypeError(f"net is {kind(net)}; give a models.Net, such as NetA()")
    if not isinstance(net.c11, torch.nn.Conv2d):
        raise TypeError(f"c11 is a {type(net.c11).__name__}; give a Conv2d, as in models.Net")
    first = {}
    for name, parameter in net.named_parameters():
        if not is_lazy(parameter) and first.setdefault(parameter.data_ptr() or name, name) != name:
            advice = "give both modules one nn.Parameter"
            raise ValueError(f"{name} shares memory with {first[parameter.data_ptr()]}; {advice}")


def kind(thing):
    return f"the class {thing.__name__}" if isinstance(thing, type) else f"a {type(thing).__name__}"


def check_input(net):
    """Raise ValueError, in one line, unless `net` takes color images in float32; TypeError if it is no module."""
    if not isinstance(net, torch.nn.Module):
        raise TypeError(f"net is {kind(net)}; give a module, such as NetA()")
    for name, parameter in net.named_parameters():
        if parameter.dtype != torch.float32:
            raise ValueError(f"{name} is of {parameter.dtype}; give a net whose parameters are all float32")
    conv = getattr(getattr(net, "C1", None), "conv", None)
    if isinstance(conv, torch.nn.Conv2d) and conv.in_channels != 3:
        raise ValueError(f"in_channels is {conv.in_channels}; the images have 3 colors")


@functools.cache
def print_once(line):
    print(line)


class Trainer:
    """Train a `models.Net` on `engine.data.Data` with `utils.Settings`; `step` is one whole training step.

    Master weights are float32; a copy in low precision, filled anew in each step, computes logits and gradients
    (Micikevicius et al. 2018, https://arxiv.org/abs/1710.03740). All state lives in tensors on the device, so nothing
    returns to the host within an epoch. On CUDA one step is captured as a graph and replayed, unless `capture` is
    False. From then on weights lie in channels last, where `view` fails and `reshape` works;
    ``net.to(memory_format=torch.contiguous_format)`` ends that. A net with a `fast.reason_against_copy` trains as it is
    instead: in float32, without copy and graph, in the memory layout that it has.

    fused    whether to take the step of engine.kernels, see `takes_fused_step`
    stream   number of the CUDA stream: nets that train at the same time need one each
    TypeError for another kind of net, or of c11; ValueError when a batch is larger than the training split, the net has
    fewer classes than the data, a parameter is frozen, not float32 or in another's memory, a part of a net in train
    mode is in eval mode, the net can't be copied, or a subclass with a `batch` or `loss` of its own asks for `fused`;
    in a step, when a parameter gets no gradient, or is made or removed. Nets with random layers do not resume bit for
    bit.
    """

    def __init__(self, net, data, settings, fused=None, capture=True, stream=0):
        check_kind(net)
        device = data.images.device
        self.net, self.data, self.settings = net, data, settings
        self.steps_per_epoch = len(data.images) // settings.batch_size
        self.epochs_left = settings.epochs
        if self.steps_per_epoch == 0:
            raise ValueError(f"batch_size is {settings.batch_size}; there are {len(data.images)} training images")
        if net.c11.out_channels < len(data.classes):
            raise ValueError(f"classes is {net.c11.out_channels}; {data.name} has {len(data.classes)}")
        for name, parameter in net.named_parameters():
            if parameter.dtype != torch.float32 or not parameter.requires_grad:
                state = f"of {parameter.dtype}" if parameter.requires_grad else "frozen"
                raise ValueError(f"{name} is {state}; give a net whose parameters are all float32 and trained")
        check_input(net)
        frozen = {name: module for name, module in net.named_modules() if net.training and not module.training}
        net.train()
        if thawed := [name for name, module in frozen.items() if module.training]:
            for name in thawed:
                frozen[name].training = False
            raise ValueError(f"{thawed[0]} is in eval mode, which training would end; call net.train() first")
        net.to(device)
        as_it_is = bool(reason := fast.reason_against_copy(net))
        if not as_it_is:
            net.to(memory_format=torch.channels_last)
        for p in net.parameters():  # a slice of another tensor gets memory of its own
            p.data = with_strides(p.data, torch.empty_like(p).stride())
        self.strides = [p.stride() for p in net.parameters()]
        if as_it_is:
            print_once(f"training in float32, step by step: {reason}")
        self.dtype = fast.training_precision(net, device)
        self.loss_scale = LOSS_SCALE if self.dtype == torch.float16 else 1
        self.diverged = torch.zeros((), device=device)  # 1 from the first step on whose gradients are not finite
        own = [name for name, method in STOCK.items() if getattr(type(self), name) is not method]
        if own and fused:
            raise ValueError(f"there is no fused step here: this Trainer has a {own[0]} of its own")
        fused = False if own else fused
        self.fused, self.model, self.copied = None, None, []
        if (fused or not as_it_is) and takes_fused_step(net, device, fused):
            from engine import kernels

            options = settings.batch_size, settings.augment, self.diverged, settings.label_smoothing
            self.fused = kernels.FusedNet(net, data.images, data.labels, *options)
        elif as_it_is:
            self.model = net
        else:
            self.model = fast.low_precision_copy(net, self.dtype, reorder=not own)
            pairs = zip(self.model.parameters(), net.parameters(), strict=True)
            self.copied = [(low, master) for low, master in pairs if low is not master]
        self.trained = [*self.model.parameters()] if self.model else []  # a step may not make or remove one
        total_steps = self.steps_per_epoch * settings.epochs
        self.learning_rates = schedule(total_steps, settings.learning_rate, settings.warmup, device)
        self.lr = self.learning_rates[0].clone()
        groups = models.param_groups(net, settings.weight_decay)
        self.optimizer = OPTIMIZERS[settings.optimizer](groups, self.lr, settings.momentum, self.dtype)
        self.generator = torch.Generator(device).manual_seed(settings.seed)
        self.order = torch.zeros(self.steps_per_epoch, settings.batch_size, dtype=torch.int64, device=device)
        self.shift = torch.zeros(len(data.images), 2, dtype=torch.int64, device=device)
        self.flip = torch.rand(len(data.images), generator=self.generator, device=device) < 0.5
        self.counts = torch.zeros(2, 1, dtype=torch.int64, device=device)
        self.epoch_step, self.global_step = self.counts
        self.metric_sums = torch.zeros(2, device=device)  # over the epoch so far: loss, and accuracy from 0 to 1
        self.steps_taken = 0  # of the epoch under way
        self.optimizer.found_inf = self.diverged
        self.unscale = torch.full((), 1 / self.loss_scale, device=device)
        self.stream = fast.cuda_stream(device, stream) if device.type == "cuda" else None
        self.on_stream = functools.partial(torch.cuda.stream, self.stream) if self.stream else contextlib.nullcontext
        if self.fused:
            self.prepare_fused_step(kernels)
        # Without a graph None, since self.step here would keep this object alive.
        self.captured_step = self.capture() if self.stream and capture and not as_it_is else None
        self.steps_taken = self.steps_per_epoch  # no epoch is under way
        self.held, self.parts = None if as_it_is else fast.held(net), self.held_parts()
        self.lr_version = self.lr._version  # grows when somebody else writes into it

    def batch(self):
        """Return the next step's normalized images (B, 3, 32, 32) and labels (B,). ValueError but within `epoch`."""
        self.check_under_way()
        chosen = self.order.index_select(0, self.epoch_step)[0]
        images = self.data.images.index_select(0, chosen)
        if self.settings.augment != "none":
            images = crop_and_flip(images, self.shift.index_select(0, chosen), self.flip.index_select(0, chosen))
        return normalize(images).to(self.dtype), self.data.labels.index_select(0, chosen)

    def prepare_fused_step(self, kernels):
        """Make what `step` calls where it is fused; on a GPU, compile the kernels."""
        state = self.order, self.shift, self.flip, self.learning_rates, self.counts.view(2), self.metric_sums, self.lr
        self.fused_state = kernels.StepState(self.fused, *state)
        launches = [*self.fused.launches(*self.fused_state.batch), *self.fused_state.launches()]
        self.update = self.optimizer.step
        if type(self.optimizer) is Muon and self.optimizer.direction is newton_schulz and self.has_the_kernels_groups():
            self.update = kernels.MuonStep(self.fused, self.optimizer)
            launches.append(self.update.launch())
        if self.stream:
            with torch.cuda.device(self.stream.device):
                kernels.compile_all(launches, self.fused.other_norms)

    def has_the_kernels_groups(self):
        """Return whether the parameter groups are those that the kernel of Muon takes: not of an edited models.py."""
        groups = self.optimizer.param_groups
        found = [(group["use_muon"], group["lr"], group["momentum"]) for group in groups]
        known = [(use_muon, self.lr, self.settings.momentum) for use_muon in (True, False)]
        return found == known and groups[1]["weight_decay"] == 0

    def step(self):
        """Take the next step of an epoch, as `epoch` does. ValueError without one under way.

        From the first step with a gradient that is not finite on, no parameter changes.
        """
        self.check_under_way()
        self.check_rate()
        try:
            with self.on_stream():
                self.replay()
        finally:
            self.lr_version = self.lr._version
        self.steps_taken += 1

    def check_under_way(self):
        if self.steps_taken == self.steps_per_epoch:
            raise ValueError("no epoch is under way; take steps by iterating over epoch()")

    def check_rate(self):
        """Raise ValueError for a rate that was set in the optimizer: steps take theirs from `learning_rates`."""
        another = any(group["lr"] is not self.lr for group in self.optimizer.param_groups)
        if another or self.lr._version != self.lr_version:
            raise ValueError("a learning rate was set in the optimizer; write it into this Trainer's learning_rates")

    def replay(self):
        """Replay the captured step where there is one, else compute it."""
        (self.captured_step or self.compute_step)()

    def compute_step(self):
        """Take `step` without a CUDA graph."""
        with torch.autocast(self.order.device.type, enabled=False):  # which whoever calls this may have on
            if self.fused:
                self.fused(*self.fused_state.begin())
                self.update()
                self.fused_state.end()
            else:
                self.pytorch_step()

    def pytorch_step(self):
        """Compute a step by PyTorch's kernels."""
        images, labels = self.batch()
        with torch.no_grad():
            if self.copied:
                torch._foreach_copy_(*map(list, zip(*self.copied, strict=True)))
        for parameter in (*self.model.parameters(), *self.net.parameters()):
            parameter.grad = None
        # In float16 cuDNN's deterministic kernels are as fast as its others.
        with torch.backends.cudnn.flags(enabled=True, deterministic=True):
            loss, accuracy = self.loss(images, labels)
            (self.loss_scale * loss).backward()
        gradients, masters = [low.grad for low in self.trained], [*self.net.named_parameters()]
        if [*map(id, self.model.parameters())] != [*map(id, self.trained)]:
            raise ValueError("training makes a parameter, or removes one; have all of them before")
        for (name, master), low, gradient in zip(masters, self.trained, gradients, strict=True):
            if master is not low and master.grad is not None:
                advice = "use self.model in `loss`, and self in `forward`"
                raise ValueError(f"the loss depends on {name} itself, beside the copy that is trained; {advice}")
            if gradient is None:
                raise ValueError(f"{name} gets no gradient; give a net that uses all its parameters")
        gradients = [gradient.float() for gradient in gradients]
        torch._amp_foreach_non_finite_check_and_unscale_(gradients, self.diverged, self.unscale)
        self.lr.copy_(self.learning_rates.index_select(0, self.global_step)[0])
        for parameter, gradient, strides in zip(self.net.parameters(), gradients, self.strides, strict=True):
            if self.model is self.net and parameter.stride() != strides:  # it may have changed
                parameter.data = with_strides(parameter.data, strides)
            parameter.grad = with_strides(gradient, strides)
        self.optimizer.step()
        with torch.no_grad():
            self.metric_sums += torch.stack([loss, accuracy])
            self.counts += 1 - self.diverged.long()  # stays at the first step that diverged

    def loss(self, images, labels):
        """Return the mean loss and the accuracy, 0 to 1, of a batch.

        A loss of your own takes `self.model` for the net, which may be a copy: ValueError, in a step, for `self.net`.
        """
        logits = self.model(images).float()
        accuracy = (logits.detach().argmax(1) == labels).float().mean()
        return F.cross_entropy(logits, labels, label_smoothing=self.settings.label_smoothing), accuracy

    def capture(self):  # pragma: no cover - needs a GPU: tests/gpu
        """Capture `compute_step` as a CUDA graph, restore all state, and return the graph's replay."""
        tensors = [*self.net.parameters(), *self.net.buffers(), self.counts, self.diverged]
        before = [tensor.detach().clone() for tensor in tensors]
        graph = torch.cuda.CUDAGraph()
        device = self.stream.device  # not always the current one
        self.stream.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(self.stream):
            for _ in range(2):  # libraries set themselves up in their first calls, which can't be captured
                self.compute_step()
                self.epoch_step.zero_()
                self.global_step.zero_()
        torch.cuda.synchronize(device)
        collecting = gc.isenabled()
        gc.disable()  # to free another net's graph now would end the capture
        try:
            with torch.cuda.graph(graph, stream=self.stream):
                self.compute_step()
        finally:
            if collecting:
                gc.enable()
        with torch.no_grad():
            for tensor, value in zip(tensors, before, strict=True):
                tensor.copy_(value)
            for tensor in self.optimizer_tensors():  # momentum and the like all begin at 0
                tensor.zero_()
        torch.cuda.synchronize(device)
        return graph.replay

    def epoch(self):
        """Yield after enqueueing each step of one epoch; does not wait for the GPU.

        On a GPU the steps run on a stream of their own, for which the current stream waits when the epoch ends. Within
        the epoch, what reads or changes weights belongs inside ``with trainer.on_stream():``.

        With flips, half of the images, drawn at first, are mirrored, and in the next epoch the other half: no image is
        seen the same way twice in a row (Jordan 2024, https://arxiv.org/abs/2404.00498). Crops are drawn each epoch.

        ValueError, when it begins, after the last epoch of the settings, and for what changed since this Trainer was
        made and would be ignored:

        - the net in more than its weights: moved, frozen, in eval mode, with other modules, settings or hooks. A net
          that trains as it is may change.
        - `settings`, `optimizer`, its parameters, or a rate that was set in it, by hand, by a scheduler or by its
          load_state_dict. Rates are written into `learning_rates`, (steps,), instead.
        - where there is a CUDA graph or fused step, also `data`, `loss`, `batch`, and anything in the optimizer.
        """
        if self.epochs_left == 0:
            raise ValueError(f"all epochs are done; settings.epochs is {self.settings.epochs}")
        if self.held and self.held != fast.held(self.net):
            raise ValueError("the net was changed since this Trainer was made, in more than its weights; make another")
        if self.parts != self.held_parts():
            raise ValueError("data, settings, loss or optimizer were changed since this Trainer was made; make another")
        self.check_rate()
        self.epochs_left -= 1
        if self.stream:
            # The state may just have been loaded on the current stream.
            self.stream.wait_stream(torch.cuda.current_stream(self.stream.device))
        with self.on_stream():
            device, n = self.order.device, len(self.data.images)
            order = torch.randperm(n, generator=self.generator, device=device)
            self.order.copy_(order[: self.order.numel()].view_as(self.order))
            if "flip" in self.settings.augment:
                self.flip.logical_not_()
            if "crop" in self.settings.augment:
                crop = self.settings.crop
                shift = torch.randint(-crop, crop + 1, (n, 2), generator=self.generator, device=device)
                self.shift.copy_(shift)
            self.epoch_step.zero_()
            self.metric_sums.zero_()
        self.steps_taken = 0
        try:
            for _ in range(self.steps_per_epoch):
                self.step()
                yield
        finally:
            if self.stream:
                torch.cuda.current_stream(self.stream.device).wait_stream(self.stream)

    def held_parts(self):
        """Return what the steps hold beside the net; in a CUDA graph or fused step, all that they read."""
        params = [[*map(id, group["params"])] for group in self.optimizer.param_groups]
        held = self.settings, id(self.optimizer), params
        if not (self.fused or self.captured_step):
            return held
        groups = [group | {"params": None, "lr": None} for group in self.optimizer.param_groups]
        hooks = self.optimizer._optimizer_step_pre_hooks, self.optimizer._optimizer_step_post_hooks
        tensors = self.data.images, self.data.labels, self.learning_rates, *self.optimizer_tensors()
        own = [getattr(self.optimizer, name, None) for name in ("rest_lr", "direction", "dtype")]  # Muon's
        own += map(vars(self).get, STOCK)
        return held, groups, [*map(len, hooks)], own, [*map(id, (self.data, *tensors))]

    def means(self):
        """Return the epoch's mean training loss and accuracy (percent) so far; waits for the GPU."""
        if self.stream:
            self.stream.synchronize()
        loss, accuracy = (self.metric_sums / max(1, self.steps_taken)).tolist()
        return loss, 100 * accuracy

    def check_finite(self):
        """Raise FloatingPointError, which names the step, if a gradient was not finite: no parameter changed since."""
        if self.diverged.item():
            step = self.global_step.item()
            raise FloatingPointError(
                f"{self.net.norm} norm, seed {self.settings.seed}, diverged in "
                f"epoch {step // self.steps_per_epoch + 1}, step {step % self.steps_per_epoch + 1} of "
                f"{self.steps_per_epoch}, at a learning rate of "
                f"{self.learning_rates[step].item():.3g} (learning_rate is {self.settings.learning_rate}); "
                "try a lower one"
            )

    def optimizer_tensors(self):
        return [value for state in self.optimizer.state.values() for value in state.values()]

    def state_dict(self):
        """Return all that the next epochs depend on, as tensors, which training changes; for between two epochs."""
        return {
            "net": self.net.state_dict(),
            "optimizer": self.optimizer.state_dict()["state"],
            "global_step": self.global_step,
            "flip": self.flip,
            "generator": self.generator.get_state(),
        }

    def load_state_dict(self, state):
        """Resume from a `state_dict` of the same net, data and settings, between two epochs."""
        self.steps_taken = self.steps_per_epoch
        self.metric_sums.zero_()
        self.diverged.zero_()
        self.net.load_state_dict(state["net"])
        self.epochs_left = self.settings.epochs - int(state["global_step"]) // self.steps_per_epoch
        # Written in place, since a captured graph reads these very tensors.
        pairs = zip(self.optimizer.state_dict()["state"].values(), state["optimizer"].values(), strict=True)
        for own, saved in pairs:
            for name, tensor in own.items():
                tensor.copy_(saved[name])
        with torch.no_grad():
            self.global_step.copy_(state["global_step"])
            self.flip.copy_(state["flip"])
        self.generator.set_state(state["generator"])


STOCK = {"batch": Trainer.batch, "loss": Trainer.loss}  # as this file has them, whatever is set at run time
