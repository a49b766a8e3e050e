"""Several devices, one model. Three ways to share the work, behind one small interface:

    Replicated    one process, or DDP: every device holds everything; gradients are averaged once per optimizer step
    Sharded       --fsdp: weights, gradients and optimizer are shared out (ZeRO stage 3); a block's weights are gathered
                  right before it computes and dropped after. torch's own fully_shard, no extra package
    DeepSpeed     --deepspeed 1|2|3|FILE.json: ZeRO by the deepspeed package; --offload moves state to the host's memory

    parallel = make_parallel(machine, config)
    model = parallel.build(llama, prepare)                # memory is there, values are not
    network = parallel.wrap(model, optimizer, ...)        # what the loop calls
    parallel.fill(tensors)                                # whole tensors in, one at a time

A checkpoint is the same file whoever wrote it: `read` gives back a whole tensor by name and `write` takes one, whatever part of
it lives on this device. So a run may go on under another strategy, on another number of devices.

Where only some parameters learn, the others are frozen before anything is wrapped: they have no gradient, no optimizer state and no
place in a bucket, and backward computes through them but not for them. They stay exactly what fill() was given, also where the
devices compute with a rounded copy.
"""

from __future__ import annotations

from settings import UserError, read_json, too_small

import contextlib
import functools
import json
import logging
import os
import warnings
from collections.abc import Callable, Collection, Iterable
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn

import devices
from layers import packed_layers
from model import Llama, LlamaConfig
from runtime import Machine, MachineConfig


def strategy_problems(config: MachineConfig) -> list[str]:
    """What is wrong with the flags that choose a strategy."""
    found = []
    if config.deepspeed is not None and config.deepspeed not in ("1", "2", "3"):
        if Path(config.deepspeed).suffix != ".json":
            found.append(f"--deepspeed takes 1, 2, 3 or a FILE.json, not {config.deepspeed}")
        elif not Path(config.deepspeed).is_file():
            found.append(f"--deepspeed {config.deepspeed} does not exist")
    if config.deepspeed is not None and config.fsdp:
        found.append("--fsdp and --deepspeed are two ways to do the same; choose one")
    if config.offload and config.deepspeed is None:
        found.append("--offload needs --deepspeed 2 or 3; without DeepSpeed there is --offload-optimizer")
    if config.offload_optimizer and (config.fsdp or config.deepspeed is not None):
        found.append("--offload-optimizer is for one device and for DDP; with --deepspeed use --offload")
    return found + too_small(config, "timeout")


def make_parallel(machine: Machine, config: MachineConfig):
    kind = DeepSpeed if config.deepspeed else Sharded if config.fsdp else Replicated
    return kind(machine, config)


class Replicated:
    """Every device holds the whole model; with several processes DDP averages the gradients."""

    sharded = False  # whether forward needs all ranks
    engine = None  # DeepSpeed's, which unscales, clips, steps and clears by itself

    def __init__(self, machine: Machine, config: MachineConfig):
        self.machine, self.config = machine, config
        # DDP's buckets stay in memory anyway; gradients that are set to None would pile up beside them while accumulating.
        self.frees_gradients = machine.world == 1

    def describe(self) -> str:
        return ", DDP" if self.machine.world > 1 else ""

    def build(self, llama: LlamaConfig, prepare: Callable[[Llama], object] = lambda model: None) -> Llama:
        """The model, its parameters on the device in fp32 but without values: see fill(). `prepare` changes it before it takes any
        memory: freeze(), or adapters.attach()."""
        with torch.device("meta"):
            model = Llama(llama)
            prepare(model)
        return model.to_empty(device=self.machine.device)

    def wrap(self, model: Llama, optimizer: torch.optim.Optimizer, *, clip: float, micro_batch: int, micro_batches: int) -> nn.Module:
        """What the loop calls to get a loss. `clip`, `micro_batch` and the number of micro-batches per step and rank are for
        DeepSpeed, which wants to know them."""
        self.model, self.optimizer = model, optimizer
        if self.machine.compile:
            self._compile(model)
        if self.machine.world == 1:
            return model
        ids = [self.machine.device.index] if self.machine.device.index is not None else None
        # Buffers are packed weights, which no forward pass changes: they need not be sent round before each.
        with warnings.catch_warnings(action="ignore", category=FutureWarning):  # its new name is only in the newest torch
            network = nn.parallel.DistributedDataParallel(model, device_ids=ids, gradient_as_bucket_view=True, broadcast_buffers=False)
        # After its first backward DDP lays its buckets out anew, and where a number lies in a bucket decides in which order three
        # or more ranks add it up. Done here, the first step of a resumed run adds as the same step of an uninterrupted one.
        tokens = torch.zeros(1, 2, dtype=torch.long, device=self.machine.device)
        for _ in range(2):
            with self.autocast():
                loss = network(tokens, tokens)
            loss.backward()
        optimizer.zero_grad(set_to_none=self.frees_gradients)
        return network

    def _compile(self, model: Llama) -> None:
        model.compile()

    # ---- one step --------------------------------------------------------------------------------------------------

    def autocast(self):
        return self.machine.autocast()

    @contextlib.contextmanager
    def micro_batch(self, network: nn.Module, last: bool):
        """Around forward and backward: gradients stay local until the last micro-batch, so one all-reduce per step."""
        with network.no_sync() if not last and self.machine.world > 1 else contextlib.nullcontext():
            yield

    def backward(self, loss: Tensor) -> None:
        self.machine.scaler.scale(loss).backward()

    def clip(self, most: float) -> Tensor:
        """Scale the gradients down to this norm; returns the norm they had, a tensor [] on every rank."""
        return nn.utils.clip_grad_norm_(self.model.parameters(), most)

    # ---- whole tensors ---------------------------------------------------------------------------------------------

    @functools.cached_property
    def parameters(self) -> dict[str, nn.Parameter]:
        return dict(self.model.named_parameters())

    @functools.cached_property
    def trained(self) -> list[str]:
        """The names of those that learn: they alone have gradients, and something in the optimizer's memory."""
        return [name for name, parameter in self.parameters.items() if parameter.requires_grad]

    def fill(self, tensors: Iterable[tuple[str, Tensor]]) -> None:
        """Give the parameters their values: (name, whole tensor) of each, the same on every rank. Packed weights are packed here."""
        packed = packed_layers(self.model)
        for name, tensor in tensors:
            if name in packed:
                packed[name].store(tensor.to(self.machine.device), name)
            else:
                self.write(name, tensor)

    def state_keys(self) -> list[str]:
        """What the optimizer keeps for each trained parameter: exp_avg, exp_avg_sq, step … Nothing before its first step."""
        states = list(self.optimizer.state.values())
        return list(states[0]) if states else []

    def read(self, name: str, key: str | None = None) -> Tensor:
        """A whole parameter in fp32, or what the optimizer keeps for it under `key`. All ranks call it in the same order."""
        parameter = self.parameters[name]
        return self._whole(parameter.detach() if key is None else self.optimizer.state[parameter][key])

    @torch.no_grad()
    def write(self, name: str, tensor: Tensor, key: str | None = None) -> None:
        """The opposite of read. Every rank passes the whole tensor and keeps its part."""
        parameter = self.parameters[name]
        if key is None:
            parameter.copy_(self._part(tensor, parameter))
        elif key == "step":  # the fused kernel wants its counter beside the parameters, the plain one on the CPU
            fused = self.optimizer.defaults.get("fused")
            self.optimizer.state[parameter][key] = tensor.to(self.machine.device if fused else "cpu")
        else:
            where = "cpu" if self.config.offload_optimizer else parameter.device
            self.optimizer.state[parameter][key] = self._part(tensor, parameter).to(where)

    def _whole(self, tensor: Tensor) -> Tensor:
        return tensor

    def _part(self, tensor: Tensor, like: nn.Parameter) -> Tensor:
        return tensor


class Sharded(Replicated):
    """torch's fully_shard around every block and around the rest (embedding, last norm, head). Compute dtype is bf16 where the
    hardware has it; shards, gradients and their reduction stay fp32."""

    sharded = True

    def __init__(self, machine: Machine, config: MachineConfig):
        super().__init__(machine, config)
        self.frees_gradients = True

    def describe(self) -> str:
        return ", FSDP"

    def build(self, llama: LlamaConfig, prepare: Callable[[Llama], object] = lambda model: None) -> Llama:
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

        with torch.device("meta"):
            model = Llama(llama)
            prepare(model)
        mesh = init_device_mesh(self.machine.device.type, (self.machine.world,))
        low = None if self.machine.dtype == torch.float32 else self.machine.dtype
        policy = MixedPrecisionPolicy(param_dtype=low, reduce_dtype=torch.float32, cast_forward_inputs=False)
        for block in model.model.layers:
            fully_shard(block, mesh=mesh, mp_policy=policy)
        fully_shard(model, mesh=mesh, mp_policy=policy)
        return model.to_empty(device=self.machine.device)

    def wrap(self, model: Llama, optimizer: torch.optim.Optimizer, **_) -> Llama:
        self.model, self.optimizer = model, optimizer
        if self.machine.compile:
            self._compile(model)
        return model

    def _compile(self, model: Llama) -> None:
        for block in model.model.layers:  # between blocks stand the gathers, which no graph holds
            block.compile()

    @contextlib.contextmanager
    def micro_batch(self, network: nn.Module, last: bool):
        """Gradients are reduced after every micro-batch: to keep them local would take a whole model's gradients per device."""
        yield

    def clip(self, most: float) -> Tensor:
        return super().clip(most).full_tensor()

    def _whole(self, tensor: Tensor) -> Tensor:
        return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor

    def _part(self, tensor: Tensor, like: nn.Parameter) -> Tensor:
        from torch.distributed.tensor import distribute_tensor

        # src_data_rank None: every rank has the whole tensor, nothing needs to be sent
        return distribute_tensor(tensor.to(like.device), like.device_mesh, like.placements, src_data_rank=None)


class DeepSpeed(Replicated):
    """ZeRO. Stage 1 shares out the optimizer, 2 the gradients too, 3 the weights too. Precision, batch, accumulation and clipping
    come from our flags, optimizer and schedule are ours; a FILE.json adds what it likes beside them.

    bf16 at stages 2 and 3: bf16 weights, fp32 masters, fp32 accumulation. At stage 1 DeepSpeed would accumulate in bf16, so weights
    stay fp32 there under autocast, as with DDP. fp16 is refused: its loss scaling there could not be compared with ours.
    """

    def __init__(self, machine: Machine, config: MachineConfig):
        super().__init__(machine, config)
        if machine.dtype == torch.float16:
            raise UserError("--deepspeed computes in bf16 or fp32; for fp16 (--dtype, or what this device does best) use --fsdp")
        os.environ.setdefault("DS_ACCELERATOR", machine.device.type)
        os.environ.setdefault("LOCAL_RANK", "0")
        try:
            import deepspeed
        except ImportError as error:
            raise UserError(f"--deepspeed needs that package ({error}): DS_BUILD_OPS=0 pip install deepspeed, or use --fsdp, which "
                            "shares out the same with torch alone") from None  # fmt: skip
        self.deepspeed = deepspeed
        logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
        warnings.filterwarnings("ignore", "`torch.distributed", FutureWarning)  # names that DeepSpeed still calls
        if machine.compile:
            machine.print("notice: --compile is left out with --deepspeed")
        if machine.device.type == "cpu":  # else its first start compiles a shared-memory reduction for a minute and a half
            import deepspeed.ops

            deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        deepspeed.init_distributed(devices.backend(machine.device.type), auto_mpi_discovery=False, verbose=False)
        bare = config.deepspeed in ("1", "2", "3")
        given = {"zero_optimization": {"stage": int(config.deepspeed)}} if bare else read_json(config.deepspeed)
        zero = given.get("zero_optimization") if isinstance(given, dict) else None
        stage = zero.get("stage") if isinstance(zero, dict) else None
        if stage not in (1, 2, 3):
            raise UserError(f'--deepspeed {config.deepspeed} needs "zero_optimization": {{"stage": 1, 2 or 3, …}}, not {json.dumps(zero)}')
        self.stage, self.given, self.sharded = stage, given, stage == 3
        self.exact: dict[str, tuple[int, Tensor | None]] = {}  # of frozen parameters: see _keep_exact

    def describe(self) -> str:
        return f", DeepSpeed ZeRO-{self.stage}" + ", offloaded to host memory" * self.config.offload

    def build(self, llama: LlamaConfig, prepare: Callable[[Llama], object] = lambda model: None) -> Llama:
        if self.stage < 3:
            return super().build(llama, prepare)
        # Each weight is shared out as soon as it is made: no process ever holds the whole model.
        # (Init looks at precision and sharing only; the batch is told to wrap().)
        settings = self._settings(clip=1.0, micro_batch=1, micro_batches=1, check=False)
        with self.deepspeed.zero.Init(config_dict_or_path=settings):
            model = Llama(llama, init=False)
        prepare(model)
        added = [parameter for parameter in model.parameters() if not hasattr(parameter, "ds_id")]
        for parameter in added:
            parameter.data = parameter.data.to(self.machine.dtype)
        if added:
            self.deepspeed.zero.Init(module=model, config_dict_or_path=settings)
        return model

    def wrap(self, model: Llama, optimizer: torch.optim.Optimizer, **numbers) -> nn.Module:
        settings = self._settings(**numbers)
        try:
            self.engine, self.zero, _, _ = self.deepspeed.initialize(model=model, optimizer=optimizer, config=settings)
        except ValueError as error:  # what its settings raise when they are checked
            raise UserError(f"--deepspeed {self.config.deepspeed}: DeepSpeed refuses its settings: {error}") from None
        self.model, self.optimizer = self.engine.module, optimizer
        return self.engine

    def _settings(self, *, clip: float, micro_batch: int, micro_batches: int, check: bool = True) -> dict:
        """DeepSpeed's configuration. Raises UserError where the file sets what our flags decide."""
        ours = {"train_micro_batch_size_per_gpu": micro_batch, "gradient_accumulation_steps": micro_batches,
                "train_batch_size": micro_batch * micro_batches * self.machine.world, "gradient_clipping": clip}  # fmt: skip
        if self.machine.dtype == torch.bfloat16 and self.stage == 1:
            ours["torch_autocast"] = {"enabled": True, "dtype": "bfloat16"}
        elif self.machine.dtype == torch.bfloat16:
            ours |= {"bf16": {"enabled": True, "check_grad_overflow": True}, "data_types": {"grad_accum_dtype": "fp32"}}
        decided = dict.fromkeys(("optimizer", "scheduler", "amp", "bf16", "fp16", "torch_autocast", *ours))
        foreign = [key for key in decided if not _agrees(self.given.get(key, "auto"), ours.get(key))]
        if foreign and check:
            raise UserError(f"--deepspeed {self.config.deepspeed} sets {', '.join(foreign)}, which Cria's own flags decide (--batch-size, "
                            "--micro-batch, --clip, --dtype, --lr …): take them out of the file, or write \"auto\"")  # fmt: skip
        zero = {"stage": self.stage, **self.given.get("zero_optimization", {})}
        if any(isinstance(part, dict) and part.get("device") == "nvme" for part in zero.values()):
            raise UserError(f"--deepspeed {self.config.deepspeed}: state on NVMe cannot be gathered into our checkpoints; use device cpu")
        if self.config.offload:
            zero.setdefault("offload_optimizer", {"device": "cpu", "pin_memory": self.machine.device.type == "cuda"})
            if self.stage == 3:
                zero.setdefault("offload_param", {"device": "cpu", "pin_memory": self.machine.device.type == "cuda"})
        rest = {key: value for key, value in self.given.items() if value != "auto"}
        return {"steps_per_print": 2**62, "zero_force_ds_cpu_optimizer": False, **rest, **ours, "zero_optimization": zero}

    def autocast(self):
        return self.machine.autocast() if self.stage == 1 else contextlib.nullcontext()

    @contextlib.contextmanager
    def micro_batch(self, network: nn.Module, last: bool):
        self.engine.set_gradient_accumulation_boundary(last)
        yield

    def backward(self, loss: Tensor) -> None:
        self.engine.backward(loss, scale_wrt_gas=False)  # our loss is divided by the tokens of the whole step already

    def step(self) -> tuple[Tensor, bool]:
        """Clip, step, clear. Returns the norm and whether the step was taken: DeepSpeed skips one that is not finite."""
        self.engine.step()
        norm = torch.as_tensor(float(self.engine.get_global_grad_norm()))
        return norm, bool(self.engine.was_step_applied())

    # ---- whole tensors ---------------------------------------------------------------------------------------------
    # Stage 3 has functions for this. At stages 1 and 2 each rank owns a slice of one flat fp32 vector per parameter group, and a
    # parameter knows which part of it lies there (_hp_mapping).

    def state_keys(self) -> list[str]:
        states = [state for state in self.zero.optimizer.state.values() if state]
        return list(states[0]) if states else []

    def read(self, name: str, key: str | None = None) -> Tensor:
        parameter = self.parameters[name]
        if key == "step":
            return next(iter(self.zero.optimizer.state.values()))["step"].detach().cpu().float().reshape(()).clone()
        if not parameter.requires_grad:
            return self._read_frozen(name, parameter)
        if self.stage == 3:
            return self.zero.get_full_hp_param(parameter, key).view(parameter.ds_shape)
        whole = torch.zeros(parameter.numel(), device=self.machine.device)
        if (slice_of := parameter._hp_mapping) is not None:
            here, there = slice_of.lp_fragment_address, slice_of.hp_fragment_address
            whole[here.start : here.start + here.numel] = self._flat(slice_of, key).narrow(0, there.start, there.numel)
        dist.all_reduce(whole)
        return whole.view(parameter.shape)

    @torch.no_grad()
    def write(self, name: str, tensor: Tensor, key: str | None = None) -> None:
        parameter, tensor = self.parameters[name], tensor.to(self.machine.device)
        if key is not None:
            for flat in self._flat_vectors():  # not there before the first step
                state = self.zero.optimizer.state[flat]
                if key == "step":  # one counter for all that share a flat vector
                    state[key] = tensor.to(flat.device if self.optimizer.defaults.get("fused") else "cpu", copy=True)
                elif key not in state:
                    state[key] = torch.zeros_like(flat)
        if key == "step":
            return
        if key is None and self.stage == 3:
            with self.deepspeed.zero.GatheredParameters([parameter], modifier_rank=0):
                parameter.copy_(tensor)
        elif key is None:
            parameter.copy_(tensor)
        if not parameter.requires_grad:
            if not self.model.adapter_shapes:  # beside an adapter, what is frozen is not saved
                self._keep_exact(name, tensor, parameter.dtype)
        elif self.stage == 3:
            self.zero.set_full_hp_param(tensor.float(), parameter, key)
        elif (slice_of := parameter._hp_mapping) is not None:
            here, there = slice_of.lp_fragment_address, slice_of.hp_fragment_address
            target = self._flat(slice_of, key).narrow(0, there.start, there.numel)
            target.copy_(tensor.flatten().narrow(0, here.start, here.numel))

    # DeepSpeed has fp32 masters of what it trains alone. Frozen weights that bf16 cannot hold are kept beside it, in the host's memory:
    # one rank has one of them, the next rank the next. Those of a bf16 file need nothing.

    def _keep_exact(self, name: str, tensor: Tensor, held: torch.dtype) -> None:
        self.exact.pop(name, None)
        if not torch.equal(tensor.to(held).float(), tensor.float()):
            owner = len(self.exact) % self.machine.world
            self.exact[name] = (owner, tensor.to("cpu", torch.float32, copy=True) if owner == self.machine.rank else None)

    def _read_frozen(self, name: str, parameter: nn.Parameter) -> Tensor:
        if name in self.exact:
            owner, kept = self.exact[name]
            shape = parameter.ds_shape if self.stage == 3 else parameter.shape
            whole = torch.empty(shape, device=self.machine.device) if kept is None else kept.to(self.machine.device)
            dist.broadcast(whole, owner)
            return whole
        gathered = self.deepspeed.zero.GatheredParameters([parameter]) if self.stage == 3 else contextlib.nullcontext()
        with gathered:
            return parameter.detach().to(torch.float32, copy=True)

    def _flat_vectors(self) -> list[Tensor]:
        """This rank's fp32 weights, one flat vector per parameter group."""
        return self.zero.fp32_partitioned_groups_flat if self.stage == 3 else self.zero.single_partition_of_fp32_groups

    def _flat(self, slice_of, key: str | None) -> Tensor:
        """The flat vector of weights in which a slice lies, or of what the optimizer keeps for them."""
        weights = self._flat_vectors()[slice_of.param_group_index]
        return weights.detach() if key is None else self.zero.optimizer.state[weights][key]


def freeze(model: Llama, trained: Collection[str] | None) -> Llama:
    """Leave only the parameters of these names to learn; None: all."""
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(trained is None or name in trained)
    return model


def _agrees(given, ours) -> bool:
    """Whether what a file says of something is what we say, or nothing."""
    if isinstance(given, dict) and ours is None:
        return given.get("enabled", True) in (False, "auto")
    if isinstance(given, dict) and isinstance(ours, dict):
        return all(_agrees(value, ours.get(key)) for key, value in given.items())
    return given == "auto" or given == ours
