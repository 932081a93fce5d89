"""What a run holds is gone when it ends, and a thousand runs later nothing has grown."""

import contextlib
import gc
import weakref

import psutil
import pytest
import torch

import comfy_host
from support.host.sampling import (
    SLOT,
    load_model,
    own_adapter,
    report,
    sample,
    sparse,
    with_override,
)


def live_tensors():
    gc.collect()
    return sum(isinstance(each, torch.Tensor) for each in gc.get_objects())


def registered(model):
    """Everything on a MODEL and its modules: hooks, wrappers, attachments, patches, options."""
    modules = list(model.model.modules())
    hooks = sum(
        len(m._forward_hooks) + len(m._forward_pre_hooks) + len(m._backward_hooks) for m in modules
    )
    kept = (
        model.wrappers,
        model.callbacks,
        model.attachments,
        model.patches,
        model.object_patches,
        model.additional_models,
        model.model_options,
    )
    return hooks, [sorted(vars(module)) for module in modules], [repr(each) for each in kept]


def interrupted(model):
    """A run that a person stops after its first step, as the interrupt button does."""
    import comfy.model_management as management

    def press(func, *args, **kwargs):
        management.interrupt_current_processing()
        return func(*args, **kwargs)

    with pytest.raises(management.InterruptProcessingException):
        sample(with_override(model, press), steps=2, latent=(3, 16, 16))
    management.interrupt_current_processing(False)


@pytest.mark.slow
def test_a_thousand_runs_leave_nothing_behind(thorough):
    """Dense, sparse, other shape, other adapter, interrupted: dense stays equal, bitwise."""
    model = load_model("tiny_wan_smallest")
    rola, ropeslr = (own_adapter(method, 1, 1) for method in ("rola", "ropeslr"))
    small = dict(steps=1, latent=(3, 16, 16))
    dense, wide = sample(model, **small), sample(model, steps=1, latent=(2, 15, 18))
    before, ends = registered(model), []

    def run(turn):
        kind = turn % 8
        if kind in (0, 4):
            assert torch.equal(sample(model, **small), dense)
        elif kind == 5:
            assert torch.equal(
                sample(sparse(model, backend="dense"), steps=1, latent=(2, 15, 18)), wide
            )
        elif kind == 6:
            interrupted(sparse(model, sparsity=0.6))
        else:
            settings = {
                1: dict(),
                2: dict(method="adaspa", block_order="raster"),
                3: dict(adapter=rola),
                7: dict(adapter=ropeslr, calibrate="refine"),
            }[kind]
            patched = sparse(model, sparsity=0.6, **settings)
            sample(patched, **(dict(steps=1, latent=(2, 15, 18)) if kind == 1 else small))
            assert report(patched).sparse_calls == 1
            ends.append(weakref.ref(report(patched)))

    for turn in range(1000 if thorough else 400):
        run(turn)
        if turn == 199:
            settled, memory = live_tensors(), psutil.Process().memory_info().rss
    assert live_tensors() <= settled
    assert psutil.Process().memory_info().rss < memory + 32e6
    assert registered(model) == before
    assert sum(end() is not None for end in ends) <= 1
    assert torch.equal(sample(model, **small), dense)


def test_what_a_run_remembers_is_freed_at_its_end(monkeypatch):
    """What methods remember is freed before ComfyUI decodes the video and needs the memory."""
    run_class, made = comfy_host.module(".attention").AttentionRun, []
    begin = run_class.__init__

    def watched(self, *args):
        begin(self, *args)
        made.append(weakref.ref(self))

    monkeypatch.setattr(run_class, "__init__", watched)
    model = load_model("tiny_wan21_t2v")
    patched = sparse(model, method="adaspa", sparsity=0.6)
    sample(patched)
    assert len(made) == 1 and made[0]() is None


def test_a_layer_that_stays_dense_does_not_keep_its_hidden_state():
    """An adapter's hooks keep the layer's input, a large tensor, no longer than needed."""
    patched = sparse(load_model("tiny_wan21_t2v"), adapter=own_adapter("rola"), dense_layers="0")
    block, seen, alive = patched.model.diffusion_model.blocks[0], [], []
    hooks = [
        block.self_attn.register_forward_pre_hook(
            lambda module, args: seen.append(weakref.ref(args[0]))
        ),
        block.register_forward_hook(lambda *_: alive.append(seen[-1]() is not None)),
    ]
    try:
        sample(patched)
    finally:
        for hook in hooks:
            hook.remove()
    assert report(patched).dense_calls == {"dense layers": 3} and alive == [False] * 3


def test_an_exception_inside_the_override_leaves_the_model_as_it_was(monkeypatch):
    """Out of the sparse path where strict hands it on, and of whoever holds the slot below."""
    model = load_model("tiny_wan21_t2v")
    dense, before = sample(model), registered(model)

    def fails(func, *args, **kwargs):
        raise ArithmeticError("the other pack failed")

    def broken(self, *args, **kwargs):
        raise MemoryError("the sparse path failed")

    for patched, error in (
        (with_override(sparse(model), fails), ArithmeticError),
        (sparse(model, strict=True, adapter=own_adapter("rola")), MemoryError),
    ):
        if error is MemoryError:
            monkeypatch.setattr(comfy_host.module(".attention").AttentionRun, "attend", broken)
        with pytest.raises(error):
            sample(patched)
        assert registered(model) == before and torch.equal(sample(model), dense)


@pytest.mark.parametrize("method", ["ropeslr", "rola"])
def test_an_interruption_in_mid_sampling_leaves_the_model_as_it_was(method):
    model = load_model("tiny_wan21_t2v")
    dense, before = sample(model), registered(model)
    patched = sparse(model, sparsity=0.6, adapter=own_adapter(method) if method == "rola" else None)
    interrupted(patched)
    assert not report(patched).completed and report(patched).model_calls == 1
    assert registered(model) == before and torch.equal(sample(model), dense)
    assert torch.isfinite(sample(patched)).all() and report(patched).completed


def test_nothing_is_recorded_by_the_hosts_memory_compiler(monkeypatch):
    """Newer ComfyUI expects what a block allocates to be freed at its end.

    A run's memory is exempt.
    """
    memory, run_class = (
        comfy_host.module(".nodes.patching.malloc_graph"),
        comfy_host.module(".attention").AttentionRun,
    )
    paused, inside, attend = [], [], run_class.attend

    class Host:
        @staticmethod
        @contextlib.contextmanager
        def pause_malloc_graph():
            paused.append(True)
            try:
                yield
            finally:
                paused.pop()

    def watched(self, *args, **kwargs):
        inside.append(len(paused))
        return attend(self, *args, **kwargs)

    def below(func, *args, **kwargs):
        assert not paused  # dense attention is the host's own business
        return func(*args, **kwargs)

    monkeypatch.setattr(memory, "model_prefetch", Host)
    monkeypatch.setattr(run_class, "attend", watched)
    patched = with_override(sparse(load_model("tiny_wan21_t2v"), dense_first_steps=1), below)
    sample(patched)
    assert inside == [1, 1, 1, 1] and not paused


def test_the_slot_is_named_as_the_host_names_it():
    """The key that every pack shares; a renamed one would make this node a silent no-op."""
    import inspect

    import comfy.ldm.modules.attention

    assert SLOT in inspect.getsource(comfy.ldm.modules.attention)
    assert comfy_host.module(".nodes.patching.apply_model").SLOT == SLOT


def test_clones_on_several_devices_share_a_run_but_not_its_memory():
    """Two threads: nothing that one learns is used, lost or changed by the other.

    The counts add up.
    """
    from concurrent.futures import ThreadPoolExecutor

    run = sampling_run()
    devices = [torch.device("cuda", i) for i in range(4)]

    def work(device):
        for turn in range(300):
            run.begin_call(None)
            mine = run.attention_on(device)
            assert run.attention_on(device) is mine
            if turn % 50 == 0:
                run.forget(device)
                assert run.attention_on(device) is not mine
            module = comfy_host.module(".nodes.patching.tally")
            tally = module.Tally()
            tally.dense(module.Cell(turn, 0), "chosen", 2.0)
            tally.other_calls["cross-attention"] += 3
            run.end_call(tally)

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(work, devices))
    assert len({id(run.attention_on(device)) for device in devices}) == 4
    assert run.tally.model_calls == 1200 and run.tally.dense_calls == {"chosen": 1200}
    assert run.tally.other_calls == {"cross-attention": 3600} and run.tally.dense_flops == 2400.0


def sampling_run():
    """A sampling run of a tiny model, as a sampler would begin it."""
    plan = comfy_host.module(".attention").SparsePlan().resolve()
    patch = comfy_host.module(".nodes.patching.patch").SparsePatch(plan)
    return patch._begin(load_model("tiny_wan21_t2v"), torch.tensor([1.0, 0.5, 0.0]), starts=True)
