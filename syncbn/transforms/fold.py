"""Batch normalization merged into the layer before it: wholly for inference, or its mean alone.

Which layer a normalization follows is read off traces of the model's forward by `torch.fx`. What
they cannot show for certain stays as it is.
"""

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, fx, nn
from torch.nn import functional
from torch.nn.modules.batchnorm import _BatchNorm  # pyright: ignore[reportPrivateUsage] -- the public classes have no other common base
from torch.nn.modules.conv import _ConvNd  # pyright: ignore[reportPrivateUsage] -- as above
from torch.nn.utils.fusion import fuse_conv_bn_weights

from syncbn.errors import ConversionError
from syncbn.layers.batch_norm import SyncBatchNorm
from syncbn.layers.converted import PLAIN
from syncbn.transforms.tracing import KeptError, Trace, copy_of, is_plain, norms, traces_of

_ANY_RANK = (nn.SyncBatchNorm, *PLAIN)
_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, *_ANY_RANK)
_TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
# What may follow what: a BatchNorm2d checks that its input is (N, C, H, W), and so that the
# channels of the convolution before it are the axis that it normalizes.
_FOLLOWERS: dict[type[nn.Module], tuple[type[_BatchNorm], ...]] = {
    nn.Linear: (nn.BatchNorm1d, *_ANY_RANK),
    nn.Conv1d: (nn.BatchNorm1d, *_ANY_RANK),
    nn.Conv2d: (nn.BatchNorm2d, *_ANY_RANK),
    nn.Conv3d: (nn.BatchNorm3d, *_ANY_RANK),
    nn.ConvTranspose1d: (nn.BatchNorm1d, *_ANY_RANK),
    nn.ConvTranspose2d: (nn.BatchNorm2d, *_ANY_RANK),
    nn.ConvTranspose3d: (nn.BatchNorm3d, *_ANY_RANK),
}
# What gives a matrix for a matrix, so that a flattening before it is still felt after it.
_SAME_RANK_MODULES = (
    *(nn.Linear, nn.Identity, nn.Dropout, nn.AlphaDropout, nn.LayerNorm, *_NORMS),
    *(nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.PReLU, nn.ELU, nn.SELU, nn.GELU, nn.SiLU, nn.Mish),
    *(nn.Hardswish, nn.Tanh, nn.Sigmoid, nn.Softplus),
)
_SAME_RANK_CALLS = (
    *("relu", "relu_", "tanh", "sigmoid", torch.relu, torch.tanh, torch.sigmoid),
    *(functional.relu, functional.leaky_relu, functional.gelu, functional.silu, functional.dropout),
)


@dataclass(frozen=True)
class Folding:
    """What `fold` made of a model.

    Attributes:
        model: the folded copy, in evaluation mode.
        folded: qualified names of the batch normalizations that are an `nn.Identity` now.
        kept: the qualified name of each batch normalization that is left, and why.
    """

    model: nn.Module
    folded: tuple[str, ...]
    kept: dict[str, str]


def fold(model: nn.Module) -> Folding:
    """Return a copy for inference, where batch normalization is part of the layers before it.

    With the running mean μ and variance σ², a normalization y = (Wx + b − μ)·γ/√(σ² + eps) + β that
    directly follows a convolution or linear layer is that layer with W·γ/√(σ² + eps) and
    (b − μ)·γ/√(σ² + eps) + β, and an `nn.Identity`. The copy keeps its class and forward; its state
    dict is another one. It computes what the model does in evaluation, and must stay in that mode.

    A normalization is kept, and the reason told, unless it is certain that folding it is right: its
    layer is called once, for it alone; neither has hooks, parametrizations, an exchanged forward,
    or a tensor or place that another module shares; and the forward does not look at the two.

    - A linear layer may be given (N, L, C), of which BN normalizes L, and a trace knows no shapes.
      Folding needs a flattening to (N, C) in the forward before it, which `nn.Flatten()` is, and
      which changes nothing for inputs that are (N, C) already.
    - The input of a convolution is taken to have a batch axis, which BN demands anyway.
    - The forward is traced with each of its optional arguments given and not given. It must not
      otherwise depend on what a trace lacks: values, or the classes of its inputs.
    - Of a model that cannot be traced as a whole, everything is kept: its forward may enter its
      parts in any way. Fold those that it only calls: `model.backbone = fold(model.backbone).model`

    Does not communicate. Error: that of rounding the weights, which are computed in float64, to
    their dtype.

    Args:
        model: any module, in any mode; left unchanged. Parameters of any floating dtype, on any
            device with float64; the copies keep dtype, device, memory format and requires_grad.

    Returns:
        The copy, and which normalizations went and stayed. Without any it is a plain copy.

    Raises:
        ConversionError: a lazy layer has not seen a batch yet, and cannot be copied.

    Source: Jacob et al., "Quantization and Training of Neural Networks for Efficient
    Integer-Arithmetic-Only Inference" (2018), section 3.2; `torch.nn.utils.fusion`.
    """
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if nn.parameter.is_lazy(tensor):
            raise ConversionError(
                f"cannot fold a model with lazy layers: {name!r} has no shape yet; "
                "pass a batch first"
            )
    copied = copy_of(model)
    copied.eval()  # not in one line: an overridden train() may return nothing
    try:
        traces = traces_of(copied)
        found, kept = _layers_before(copied, traces)
        for name, layer in found.items():
            try:
                _fold_one(copied, layer, name)
            except KeptError as error:
                kept[name] = str(error)
        if not _goes_as(copied, traces):
            raise KeptError("its model's forward takes another way once anything is folded")
    except KeptError as error:
        copied = copy_of(model)
        copied.eval()
        return Folding(copied, (), dict.fromkeys(norms(model), str(error)))
    folded = tuple(name for name in found if name not in kept)
    return Folding(copied, folded, {name: kept[name] for name in norms(copied)})


def drop_redundant_bias(model: nn.Module) -> tuple[str, ...]:
    """Remove, in place, the bias of each convolution or linear layer that the BN after it cancels.

    BN subtracts the batch's mean, and with it a bias b: it has no effect in training, and no
    gradient but rounding error. It becomes None, and the running mean, if there is one, μ − b.
    Outputs in both modes, gradients and the running variance are as before, up to rounding.

    A bias stays where `fold` would not fold, for the same reasons, in training or evaluation; and
    where BN is in evaluation mode while the model trains, so that b takes part in training. For
    that, a model in evaluation mode is taken as `model.train()` would leave it. Unlike for `fold`,
    BN without running statistics will do: it uses the batch's in both modes. Of a model that
    `torch.fx` cannot trace as a whole, nothing is removed; pass the parts of it that it only calls.

    An optimizer made before still holds the removed parameters, and DistributedDataParallel waits
    for their gradients: call this before making either. Does not communicate: on several replicas,
    call it on each. Error: that of rounding μ − b to the dtype of the running mean.

    Args:
        model: any module, in any mode; only removed biases and running means are changed.

    Returns:
        The qualified names of the removed biases, such as "features.0.bias".

    Source: Goodfellow, Bengio and Courville, "Deep Learning" (2016), section 8.7.1: "the bias term
    should be omitted because it becomes redundant with the β parameter".
    """
    train, evaluation = copy_of(model), copy_of(model)
    evaluation.eval()
    if not model.training:  # else train() would undo the freezing of a part by eval()
        train.train()
    try:
        traces = [*traces_of(train), *traces_of(evaluation)]
    except KeptError:
        return ()
    dropped: list[str] = []
    for norm_name, layer_name in _layers_before(model, traces)[0].items():
        norm, layer = model.get_submodule(norm_name), model.get_submodule(layer_name)
        bias, mean = layer.bias, norm.running_mean
        if not isinstance(bias, Tensor) or not train.get_submodule(norm_name).training:
            continue
        if isinstance(mean, Tensor):
            mean.copy_(mean.double() - bias.detach().double())
        layer.register_parameter("bias", None)
        dropped.append(f"{layer_name}.bias" if layer_name else "bias")
    return tuple(dropped)


def layers_before(model: nn.Module) -> tuple[dict[str, str], dict[str, str]]:
    """Return the layer that each normalization certainly follows, or why none, by its name.

    As `fold` finds them: see there for what is certain. Does not communicate.
    """
    try:
        return _layers_before(model, traces_of(copy_of(model)))
    except KeptError as error:
        return {}, dict.fromkeys(norms(model), str(error))


def _goes_as(model: nn.Module, traces: list[Trace]) -> bool:
    """Return whether a folded model's traces are those of before.

    An `nn.Identity` leaves the same, unless the forward looks at what it calls.
    """
    try:
        return [str(t.graph) for t in traces_of(model)] == [str(t.graph) for t in traces]
    except KeptError:
        return False


def _layers_before(model: nn.Module, traces: list[Trace]) -> tuple[dict[str, str], dict[str, str]]:
    """Return the layer that each normalization certainly follows, or why none, by its name."""
    uses = Counter(id(module) for _, module in model.named_modules(remove_duplicate=False))
    for named in (model.named_parameters, model.named_buffers):
        uses.update(id(tensor) for _, tensor in named(remove_duplicate=False))
    found: dict[str, str] = {}
    kept: dict[str, str] = {}
    for name in norms(model):
        try:
            _check_layer(model, name, traces, uses)
            callers = [trace for trace in traces if name in trace.calls]
            if not callers:
                raise KeptError("the forward never calls it")
            layers = {_layer_in(model, name, trace) for trace in callers}
            layer = layers.pop()
            if layers or any(layer in t.calls and name not in t.calls for t in traces):
                raise KeptError(f"it follows {layer!r} for some arguments or modes only")
            _check_layer(model, layer, traces, uses)
            _check_fit(model, layer, name, callers)
            found[name] = layer
        except KeptError as error:
            kept[name] = str(error)
    return found, kept


def _layer_in(model: nn.Module, norm: str, trace: Trace) -> str:
    """Return what a normalization follows in one trace, if that is used for it alone."""
    node = trace.calls[norm][0]
    sources = node.all_input_nodes
    source = sources[0] if len(sources) == 1 else None
    if source is None or source.op != "call_module":
        target = getattr(source, "target", "several values")
        what = getattr(target, "__name__", target)
        raise KeptError(f"it follows {what}, and not a convolution or linear layer")
    layer = str(source.target).partition(".")[2]
    kind = type(model.get_submodule(layer))
    if kind not in _FOLLOWERS:
        raise KeptError(f"it follows {layer!r}, a {kind.__name__}; {_names(_FOLLOWERS)} would do")
    if len(node.args) + len(node.kwargs) != 1:
        raise KeptError("it adds a residual itself")
    if len(source.users) != 1 or source in trace.held:
        raise KeptError(f"the output of {layer!r} before it is used elsewhere too")
    return layer


def _check_layer(model: nn.Module, name: str, traces: list[Trace], uses: Counter[int]) -> None:
    """Raise unless a layer is of a known type, unmodified, unshared and called at most once."""
    module = model.get_submodule(name)
    tensors = [*module.parameters(), *module.buffers()]
    called = {each for trace in traces for each in trace.calls}
    boxes = [
        box for box in sorted(called) if name.startswith(f"{box}." if box else "") and box != name
    ]
    if boxes:
        reason = f"is inside {boxes[0]!r}, which is torch's own or has hooks, and not looked into"
    elif type(module) not in (*_NORMS, *_FOLLOWERS):
        reason = f"is a {type(module).__name__}, which may do more than {_names(_NORMS)}"
    elif not is_plain(module):
        reason = "has hooks or an exchanged forward"
    elif isinstance(module, SyncBatchNorm) and module.fuses_relu:
        reason = "takes a ReLU itself"
    elif uses[id(module)] != 1 or any(len(trace.calls.get(name, ())) > 1 for trace in traces):
        reason = "is used in more than one place"
    elif any(uses[id(tensor)] != 1 for tensor in tensors):
        reason = "shares a parameter or buffer with another module"
    elif any(type(tensor) not in (nn.Parameter, Tensor) for tensor in tensors):
        reason = "has tensors of a special class"
    elif any(name in trace.read for trace in traces):
        reason = "has parameters or buffers that the forward reads itself"
    else:
        return
    raise KeptError(f"{name!r} {reason}")


def _check_fit(model: nn.Module, layer_name: str, norm_name: str, callers: list[Trace]) -> None:
    """Raise unless a normalization is certain to act on the axis of a layer's output channels."""
    layer, norm = model.get_submodule(layer_name), model.get_submodule(norm_name)
    assert isinstance(norm, _BatchNorm)
    channels = layer.out_features if isinstance(layer, nn.Linear) else layer.out_channels
    if type(norm) not in _FOLLOWERS[type(layer)] or channels != norm.num_features:
        raise KeptError(f"it normalizes another axis than the outputs of {layer_name!r}")
    if isinstance(layer, nn.Linear):
        for trace in callers:
            if not _is_matrix(trace.calls[layer_name][0].all_input_nodes[0], model):
                raise KeptError(
                    f"the input of {layer_name!r} may be (N, L, C), of which it normalizes L; "
                    "if it is (N, C), say so with an nn.Flatten() before"
                )


def _is_matrix(node: fx.Node, model: nn.Module) -> bool:
    """Return whether a value is certain to have two axes."""
    while True:
        rest = [value for key, value in node.kwargs.items() if key != "input"]
        if node.op == "call_module":
            module = model.get_submodule(str(node.target).partition(".")[2])
            if not is_plain(module):
                return False
            if isinstance(module, nn.Flatten):
                return type(module) is nn.Flatten and (module.start_dim, module.end_dim) == (1, -1)
            same = type(module) in _SAME_RANK_MODULES
        elif node.target in (torch.flatten, "flatten"):
            return (*node.args[1:], *rest) in [(1,), (1, -1)] and "end_dim" not in node.kwargs
        elif node.target in ("view", "reshape"):
            # Two sizes. As proxies they are numbers: a proxy of a shape would be the only argument.
            return len(node.args) == 3 and not rest
        else:
            same = node.target in _SAME_RANK_CALLS
        if not same or not node.all_input_nodes:
            return False
        node = node.all_input_nodes[0]


def _fold_one(model: nn.Module, layer_name: str, norm_name: str) -> None:
    """Fold a normalization into its layer, or raise why it cannot be done."""
    layer, norm = model.get_submodule(layer_name), model.get_submodule(norm_name)
    assert isinstance(layer, _ConvNd | nn.Linear)
    assert isinstance(norm, _BatchNorm)
    if norm.training:
        raise KeptError("it stays in training mode in eval()")
    if norm.running_mean is None or norm.running_var is None:
        raise KeptError("it has no running statistics")
    weight, bias = _fused(layer, norm)
    if not (weight.isfinite().all() and bias.isfinite().all()):
        raise KeptError(f"the folded weights of {layer_name!r} are not finite in {weight.dtype}")
    layer.weight = nn.Parameter(weight, layer.weight.requires_grad)
    layer.bias = nn.Parameter(bias, layer.weight.requires_grad)
    parent, _, name = norm_name.rpartition(".")
    setattr(model.get_submodule(parent), name, nn.Identity().eval())


@torch.no_grad()
def _fused(layer: _ConvNd | nn.Linear, norm: _BatchNorm) -> tuple[Tensor, Tensor]:
    weight, others = layer.weight.double(), []
    transposed = isinstance(layer, _TRANSPOSED)
    if transposed:
        # (groups·in, out, *) as (in, groups·out, *): torch's fusion knows of no groups here.
        weight = weight.unflatten(0, (layer.groups, -1)).transpose(0, 1).flatten(1, 2)
    for tensor in (layer.bias, norm.running_mean, norm.running_var, norm.weight, norm.bias):
        others.append(None if tensor is None else tensor.double())
    bias, mean, variance, gamma, beta = others
    weight, bias = fuse_conv_bn_weights(
        weight, bias, mean, variance, norm.eps, gamma, beta, transpose=transposed
    )
    if transposed:
        weight = weight.unflatten(1, (layer.groups, -1)).transpose(0, 1).flatten(0, 1)
    # Of the old one's strides, so that channels_last stays what it is.
    return torch.empty_like(layer.weight).copy_(weight), bias.to(layer.weight.dtype)


def _names(types: Iterable[type]) -> str:
    return ", ".join(sorted({each.__name__ for each in types}))
