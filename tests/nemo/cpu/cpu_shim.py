"""CPU shim for NeMo2/megatron-core/modelopt. import BEFORE nemo / megatron."""

import contextlib
import os

os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")
os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")
import torch
from torch.overrides import TorchFunctionMode

if not torch.cuda.is_available():
    CPU = torch.device("cpu")

    def _fix(d):
        if isinstance(d, str) and d.startswith("cuda"):
            return CPU
        if isinstance(d, torch.device) and d.type == "cuda":
            return CPU
        if isinstance(d, int) and not isinstance(d, bool):
            return CPU
        return d

    class Cuda2Cpu(TorchFunctionMode):
        def __torch_function__(self, func, types, args=(), kwargs=None):
            kwargs = kwargs or {}
            if "device" in kwargs:
                kwargs = {**kwargs, "device": _fix(kwargs["device"])}
            if kwargs.get("pin_memory"):
                kwargs = {**kwargs, "pin_memory": False}
            if (
                func is torch.Tensor.to
                and len(args) > 1
                and (
                    isinstance(args[1], (str, torch.device))
                    or (isinstance(args[1], int) and not isinstance(args[1], bool))
                )
            ):
                args = (args[0], _fix(args[1]), *args[2:])
            if getattr(func, "__name__", "") == "_parse_to" and args:
                args = (_fix(args[0]), *args[1:])
            out = func(*args, **kwargs)
            if func is torch.Tensor.type and len(args) == 1 and not kwargs:
                out = out.replace("torch.", "torch.cuda.", 1)  # mcore asserts on 'torch.cuda.FloatTensor'
            return out

    _mode = Cuda2Cpu()
    _mode.__enter__()

    class _Stream:
        def __init__(self, *a, **k):
            pass

        def __getattr__(self, n):
            return lambda *a, **k: _Stream()

        def __enter__(self):
            return self

        def __exit__(self, *a):
            return False

    c = torch.cuda
    c.current_device = lambda: CPU
    c.set_device = lambda *a, **k: None
    c.synchronize = lambda *a, **k: None
    c.manual_seed = c.manual_seed_all = lambda *a, **k: None
    c.get_rng_state = lambda *a, **k: torch.get_rng_state()
    c.set_rng_state = lambda s, *a, **k: torch.set_rng_state(s)
    c.random.get_rng_state, c.random.set_rng_state = c.get_rng_state, c.set_rng_state
    c.Stream = c.Event = _Stream
    c.current_stream = c.default_stream = lambda *a, **k: _Stream()
    c.stream = lambda *a, **k: contextlib.nullcontext()
    c.get_device_properties = lambda *a, **k: type(
        "P", (), dict(name="cpu", major=8, minor=0, multi_processor_count=1, total_memory=1 << 34)
    )()
    c.get_device_capability = lambda *a, **k: (8, 0)
    torch.Tensor.cuda = lambda self, *a, **k: self
    torch.nn.Module.cuda = lambda self, *a, **k: self


def patch_nemo():
    import megatron.core.tensor_parallel.random as mr

    mr._set_cuda_rng_state = lambda new_state, device=-1, graph_safe=False: torch.set_rng_state(new_state)
    mr._get_cuda_rng_state = lambda device="cuda", clone=False, graph_safe=False: torch.get_rng_state()
    # modelopt: teach the NAS registry about torch RMSNorm (local spec), exactly as its TE plugin does
    import torch.nn as nn
    from modelopt.torch.nas.modules import _DynamicLayerNorm
    from modelopt.torch.nas.registry import DMRegistry
    from modelopt.torch.nas.traced_hp import TracedHp

    if nn.RMSNorm not in DMRegistry:

        @DMRegistry.register({nn.RMSNorm: "nn.RMSNorm"})
        class _DynamicRMSNorm(_DynamicLayerNorm):
            def _setup(self):
                h = self.weight.shape[-1]
                self._register_hparam("num_features", TracedHp(list(range(1, h + 1))))
                self._register_dynamic_attribute("weight", self._cut_to_active_features)
                self._register_dynamic_attribute("normalized_shape", self._get_normalized_shape)

    # NeMo: HF<->NeMo mapping assumes TE fused-layernorm parameter names
    from nemo.lightning import io
    from nemo.lightning.io import state as io_state

    ren = {
        "self_attention.linear_qkv.layer_norm_weight": "input_layernorm.weight",
        "mlp.linear_fc1.layer_norm_weight": "pre_mlp_layernorm.weight",
    }

    def sub(s):
        for a, b in ren.items():
            s = s.replace(a, b)
        return s

    orig = io_state.apply_transforms

    def apply_transforms(source, target, mapping, *a, **k):
        return orig(source, target, {sub(x): sub(y) for x, y in mapping.items()}, *a, **k)

    io.apply_transforms = io_state.apply_transforms = apply_transforms
    # modelopt layer spec -> local spec; gpu trainer -> cpu trainer
    from nemo.collections.llm.gpt.model.base import local_layer_spec
    from nemo.collections.llm.modelopt import model_utils as mu

    mu.get_gpt_modelopt_spec = lambda config, **k: local_layer_spec(config)
    from nemo import lightning as nl

    OT = nl.Trainer

    class _NL:  # proxy of `nl` inside model_utils
        def __getattr__(self, n):
            return getattr(nl, n)

        @staticmethod
        def Trainer(*a, **k):
            if k.get("accelerator") == "gpu":
                k["accelerator"] = "cpu"
            return OT(*a, **k)

        @staticmethod
        def MegatronMixedPrecision(*a, **k):  # torch RMSNorm ignores params_dtype -> stay in fp32
            return nl.MegatronMixedPrecision(precision="32")

        @staticmethod
        def MegatronStrategy(*a, **k):
            k["pipeline_dtype"] = torch.float32
            return nl.MegatronStrategy(*a, **k)

    mu.nl = _NL()


CPU_CFG = dict(
    persist_layer_norm=False,
    apply_rope_fusion=False,
    bias_dropout_fusion=False,
    bias_activation_fusion=False,
    masked_softmax_fusion=False,
    cross_entropy_loss_fusion=False,
    gradient_accumulation_fusion=False,
    use_cpu_initialization=True,
    deallocate_pipeline_outputs=False,
)


def patch_config():
    from megatron.core.transformer.transformer_config import TransformerConfig as TC

    op = TC.__post_init__

    def post(self):
        for k, v in CPU_CFG.items():
            if hasattr(self, k):
                setattr(self, k, v)
        op(self)

    TC.__post_init__ = post


_pn = patch_nemo


def patch_nemo():
    _pn()
    import nemo.lightning.io.pl as iopl

    iopl._fix_tensors_device = lambda ckpt: ckpt


_pn2 = patch_nemo


def patch_nemo():
    _pn2()
    import megatron.core.tensor_parallel.random as mr

    mr.CudaRNGStatesTracker.fork = lambda self, name=None: contextlib.nullcontext()
    torch.cuda.max_memory_allocated = torch.cuda.max_memory_reserved = lambda *a, **k: 0
    torch.cuda.reset_peak_memory_stats = lambda *a, **k: None


if not torch.cuda.is_available():
    import torch.distributed as _td

    _ag = _td.all_gather_into_tensor

    def _all_gather_into_tensor(out, inp, *a, **k):  # gloo refuses 0-dim inputs (modelopt drop-layers path)
        return _ag(out, inp.reshape(1) if inp.dim() == 0 else inp, *a, **k)

    _td.all_gather_into_tensor = _all_gather_into_tensor


_pn3 = patch_nemo


def patch_nemo():
    _pn3()
    # Megatron's distributed optimizer resumes with the optimizers of Transformer Engine and Apex. Torch's AdamW, which
    # it takes without them, has no state before its first step, keeps the step per parameter and not per group, and
    # would get one and the same tensor for all of them.
    from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer

    sharded_state_dict = DistributedOptimizer.sharded_state_dict
    set_states = DistributedOptimizer._set_main_param_and_optimizer_states
    load_state_dict = DistributedOptimizer.load_state_dict

    def initialized(self, model_sharded_state_dict, is_loading=False, *args, **kwargs):
        if is_loading and not self.optimizer.state:
            self._init_optimizer_states_with_dummy_values()
        return sharded_state_dict(self, model_sharded_state_dict, is_loading, *args, **kwargs)

    def with_step(self, model_param, tensors):
        group, order = self.model_param_group_index_map[model_param]
        state = self.optimizer.state[self.optimizer.param_groups[group]["params"][order]]
        set_states(self, model_param, {"step": state["step"]} | tensors)

    def with_own_steps(self, state_dict):
        load_state_dict(self, state_dict)
        for state in self.optimizer.state.values():
            state["step"] = state["step"].clone()

    DistributedOptimizer.sharded_state_dict = initialized
    DistributedOptimizer._set_main_param_and_optimizer_states = with_step
    DistributedOptimizer.load_state_dict = with_own_steps
