"""Models whose parameters Accelerate shards over ranks with FSDP2, and their state in one piece."""

import os
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import FullyShardedDataParallelPlugin, compare_versions, is_torch_version, str_to_bool
from torch import Tensor, nn
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, register_fsdp_forward_method
from torch.distributed.fsdp.wrap import transformer_auto_wrap_policy
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.utils import clip_grads_with_norm_, get_total_norm

from openclip_ext import upstream
from openclip_ext.errors import UserError

_COMPUTE_DTYPE = {"fp16": torch.float16, "bf16": torch.bfloat16}
#: What `accelerate launch` sets for other ways of splitting a model, or the work, than FSDP and DDP.
_REFUSED = {
    "ACCELERATE_USE_DEEPSPEED": "DeepSpeed",
    "ACCELERATE_USE_MEGATRON_LM": "Megatron-LM",
    "ACCELERATE_USE_PARALLELISM_CONFIG": "--use_parallelism_config",
}


def fsdp_plugin(mixed_precision: str) -> FullyShardedDataParallelPlugin | None:
    """What `accelerate launch --use_fsdp` or Accelerate's configuration says of FSDP; None: not to use it.

    Args:
        mixed_precision: `fp16` or `bf16`: what parameters are cast to for computing; `no`: computed with as they are.

    Raises:
        UserError: another way of sharding is configured, or options that this loop does not support.
    """
    for variable, name in _REFUSED.items():
        if _is_set(variable):
            raise UserError(
                f"Accelerate is configured for {name}, which this loop does not support; launch with accelerate launch "
                "--multi_gpu, or with --use_fsdp --fsdp_version 2"
            )
    if not _is_set("ACCELERATE_USE_FSDP"):
        return None
    if os.environ.get("FSDP_VERSION", "1") != "2":
        raise UserError(
            "Accelerate is configured for FSDP version 1, which this loop does not support; add --fsdp_version 2 to "
            "accelerate launch --use_fsdp"
        )
    if is_torch_version("<", "2.7") or compare_versions("accelerate", "<", "1.11"):
        raise UserError("FSDP needs torch 2.7 and accelerate 1.11, or newer; pip install --upgrade torch accelerate")
    dtype = _COMPUTE_DTYPE.get(mixed_precision)
    try:
        plugin = FullyShardedDataParallelPlugin(
            auto_wrap_policy=os.environ.get("FSDP_AUTO_WRAP_POLICY", "TRANSFORMER_BASED_WRAP"),
            # Accelerate's own policy also rounds averaged gradients and the logit scale that the model returns.
            mixed_precision_policy=MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32),
            # Every rank has made the model, and this fails where something in it is not sharded.
            cpu_ram_efficient_loading=False,
        )
    except (ValueError, RuntimeError) as error:
        raise UserError(f"Accelerate's configuration of FSDP: {error}") from error
    if isinstance(plugin.cpu_offload, CPUOffloadPolicy) or plugin.ignored_modules:
        raise UserError(
            "Accelerate is configured for FSDP with --fsdp_offload_params or --fsdp_ignored_modules, which this loop "
            "does not support; launch without them"
        )
    return plugin


def _is_set(variable: str) -> bool:
    return bool(str_to_bool(os.environ.get(variable, "false")))


def prepare(
    accelerator: Accelerator, model: nn.Module, optimizer: torch.optim.Optimizer, loss_parameters: list[nn.Parameter]
) -> tuple[nn.Module, Any]:
    """`accelerator.prepare`, then one last group of the optimizer, without weight decay, for the loss's parameters.

    FSDP shards in units of the model's blocks, unless the user names others. Every rank keeps, with gradients of its
    own, the loss's parameters and single numbers such as the logit scale, which cannot be sharded.

    Raises:
        UserError: what cannot be sharded, or not in the units that the user names.
    """
    if accelerator.is_fsdp2:
        if accelerator.scaler is not None and any(parameter.numel() > 1 for parameter in loss_parameters):
            raise UserError("--precision amp: does not scale parameters of a loss beside FSDP's; use amp_bf16")
        _fit_plugin(accelerator.state.fsdp_plugin, model)
    prepared = accelerator.prepare(model, optimizer)
    if loss_parameters:  # only now: Accelerate shards an optimizer of the model's parameters only
        optimizer.add_param_group({"params": loss_parameters, "weight_decay": 0.0})
    for method in ("encode_image", "encode_text"):  # what evaluation calls; nothing is done to an unsharded model
        register_fsdp_forward_method(model, method)
    return prepared


def _fit_plugin(plugin: FullyShardedDataParallelPlugin, model: nn.Module) -> None:
    dtypes = {p.dtype for p in model.parameters() if p.requires_grad and p.numel() > 1}
    if len(dtypes) > 1:
        raise UserError(
            "FSDP cannot shard parameters of several types together; use --precision amp_bf16, pure_bf16 or fp32"
        )
    if plugin.auto_wrap_policy is transformer_auto_wrap_policy:
        present = {type(module).__name__ for module in model.modules()}
        units = plugin.transformer_cls_names_to_wrap
        if missing := set(units or ()) - present:
            raise UserError(
                f"--fsdp_transformer_layer_cls_to_wrap {','.join(units)}: the model has no {', '.join(sorted(missing))}"
            )
        plugin.transformer_cls_names_to_wrap = units or sorted(present & upstream.BLOCKS)
    plugin.ignored_modules = [nn.ParameterList(p for p in model.parameters() if p.numel() == 1)]


def whole(value: Any, keep: bool = True) -> Any:
    """`value` with the sharded tensors in it gathered, in the memory of the CPU. All ranks take part.

    Args:
        value: a tensor, a dictionary of such values, or anything else, which is returned as it is.
        keep: False: leave out what is gathered, on ranks that only take part.
    """
    if isinstance(value, dict):
        return {key: whole(part, keep) for key, part in value.items()}
    if not isinstance(value, DTensor):
        return value
    full = value.full_tensor()
    return full.cpu() if keep else None


def sharded(state: dict, optimizer: torch.optim.Optimizer) -> dict:
    """An optimizer's `state_dict` with tensors sharded as `optimizer` has its parameters; inverse of `whole`."""
    indices = [index for group in state["param_groups"] for index in group["params"]]
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    states = dict(state["state"])
    for index, parameter in zip(indices, parameters, strict=False):
        if isinstance(parameter, DTensor) and index in states:
            states[index] = {name: sharded_like(value, parameter) for name, value in states[index].items()}
    return state | {"state": states}


def sharded_like(value: Any, parameter: Tensor) -> Any:
    """A whole tensor with the shape of `parameter` in parts as that is; anything else as it is."""
    if not isinstance(parameter, DTensor) or not isinstance(value, Tensor) or value.shape != parameter.shape:
        return value
    value = value.to(parameter.device)
    return distribute_tensor(value, parameter.device_mesh, parameter.placements, src_data_rank=None)


def reshard(model: nn.Module) -> None:
    """Let go of parameters that an evaluation gathered; nothing is done to a model that is not sharded."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def gradient_norm(parameters: list[nn.Parameter], clip: float | None) -> Tensor:
    """Euclidean norm of all gradients, which are then scaled down to the norm `clip`, if given. All ranks take part."""
    # Not in one call: torch mixes sharded tensors with none but single numbers.
    parts = [parameter for parameter in parameters if isinstance(parameter, DTensor)]
    others = [parameter for parameter in parameters if not isinstance(parameter, DTensor)]
    norm = get_total_norm([parameter.grad for parameter in others if parameter.grad is not None])
    if parts:
        norm_of_parts = get_total_norm([parameter.grad for parameter in parts if parameter.grad is not None])
        assert isinstance(norm_of_parts, DTensor)
        norm = torch.hypot(norm_of_parts.full_tensor(), norm)
    if clip is not None:
        clip_grads_with_norm_(parts, clip, norm)
        clip_grads_with_norm_(others, clip, norm)
    return norm
