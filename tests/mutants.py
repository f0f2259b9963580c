"""Deliberate faults, and whether the tests notice them.

    python tests/mutants.py [--only WORD] [--jobs N] [--timeout SECONDS] [--after FILE] [--no-baseline]

Each mutant is one piece of text in one file, put otherwise in a temporary copy of the tree, where the tests that must
notice it are run. A text that does not occur exactly once is out of date: put the mutant where the fact has gone.
Exits with 1 if a mutant survived or its tests ran into the time limit, which says nothing, with 2 if one is out of date
or the tests fail without any.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import shlex
import shutil
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from itertools import repeat
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

ROOT = Path(__file__).parent.parent
# What tests import beside the package.
LIBRARIES = ["torch", "triton", "torchvision", "timm", "transformers", "hypothesis", "pytest"]
FORKS = multiprocessing.get_context("forkserver")
WORDS = ("caught", "survived", "timed out", "out of date")


class Mutant(NamedTuple):
    """A fault: in `file`, under the tree's root, `old` reads `new`; `tests` are pytest's arguments."""

    file: str
    old: str
    new: str
    tests: str


def under(folder: str, *mutants: tuple[str, str, str, str]) -> list[Mutant]:
    return [Mutant(f"{folder}/{file}".rstrip("/"), *rest) for file, *rest in mutants]


FUZZ = "tests/fuzz/test_fuzz_functions.py -k quick"
GAPS = "tests/api/test_gaps.py"
REFUSED = GAPS + " -k 'refused or place'"
SHARDING = "tests/runtime/test_sharding.py"
VERDICTS = "tests/trust/test_verdicts.py tests/trust/test_verdicts_of_layers.py"
HOST = "tests/runtime/test_gaps_in_calls.py tests/runtime/test_gaps_in_proofs.py"
FINGERPRINT = "tests/trust/test_fingerprint.py tests/runtime/test_gaps_in_calls.py tests/runtime/test_gaps_in_proofs.py"
SETTINGS = "tests/trust/test_settings.py"
SWITCHES = "tests/runtime/test_switches.py"
EDITS = "tests/runtime/test_edits.py"
OPERATORS = "tests/api/test_arguments.py -k operator"
PACKAGES = "tests/runtime/test_packages.py"
GRAPHS = 'tests/runtime/test_graphs.py -k "not edits and not ways"'
TRAINING_GRAPHS = 'tests/runtime/test_training_graphs.py -k "not edits"'
GRAPH_CONTENTS = "tests/runtime/test_graph_contents.py"
COPIES = "tests/families/test_copies.py tests/families/test_returned_weights.py"
FORMS = "tests/families/test_forms.py"
ROWS = (
    "tests/api/test_functional.py tests/api/test_functional_images.py"
    " -k 'outputs_and_gradients or many_windows or test_images or volumes'"
)
WEATHER = "tests/families/test_weather.py"
TRAPS = " ".join(f"tests/runtime/test_traps_of_{one}.py" for one in ("calls", "projections", "scores", "windows"))
NONFINITE = "tests/backends/test_nonfinite.py"
FP8 = "tests/runtime/test_fp8.py tests/runtime/test_fp8_left_out.py"
FUSED = "tests/runtime/test_fused_products.py"
SAME_NUMBERS = "tests/runtime/test_training_graphs.py -k same_numbers"
LAUNCHERS = "tests/backends/test_triton_interface.py"

MUTANTS = [
    *under(
        "swinaccel",  # what training fuses beside norms
        ("ops/block_autograd.py", "is not None and version == grad._version", "is not None", FUSED),
        ("ops/block_autograd.py", "grad.__dict__.pop(", "grad.__dict__.get(", FUSED),
        ("ops/block_autograd.py", "if not grad.is_inference():", "if True:", FUSED),
        ("ops/block_autograd.py", "if not torch.is_grad_enabled():  # as under", "if False:  # as under", FUSED),
        ("backends/triton/block.py", "x.is_contiguous() and weight.is_contiguous() and are_d", "are_d", FUSED),
        ("runtime/capture.py", "if not all(map(torch.equal,", "if not any(map(torch.equal,", SAME_NUMBERS),
        ("runtime/capture.py", "self._versions = counts", "return False", SAME_NUMBERS),
    ),
    *under(
        "kernels/triton",
        ("pointwise.py", "patches_ptr + out_offs, out, mask=inside", "patches_ptr + out_offs, out, mask=real", FUSED),
        ("pointwise_bwd.py", "branch_sums += grad", "branch_sums += total", FUSED),
        ("pointwise_bwd.py", "grad.to(grad_x_ptr.dtype.element_ty), mask=real", "grad, mask=inside", FUSED),
        ("pointwise_bwd.py", "for first in tl.range(0, parts, ROWS):", "for first in tl.range(0, ROWS, ROWS):", FUSED),
        ("mlp.py", "hidden_desc.store([row, col + HALF], right", "hidden_desc.store([row, col + HALF], left", FUSED),
        ("run.py", "copy.copy(compiled)[grid]", "compiled[grid]", LAUNCHERS),
        ("run.py", "lambda: not self._is_loading and not self._builders", "lambda: True", LAUNCHERS),
    ),
    *under(
        "kernels/triton",  # packages of AOTInductor
        ("traced.py", "isinstance(one, type) and issubclass(one, tuple)", "False", PACKAGES),
        ("traced.py", "isinstance(one, JITFunction) and", "False and", PACKAGES),
        ("pointwise.py", "tl.cast(eps, tl.float32)", "eps", PACKAGES),
        ("tiles.py", "q.to(tl.float32) * tl.cast(scale, tl.float32)", "q.to(tl.float32) * scale", PACKAGES),
        ("tiles.py", "tl.cast(dropout.probability, tl.float32)", "dropout.probability", PACKAGES),
        ("sequence_fwd.py", "scale = tl.cast(scale, tl.float32)  #", "scale = scale  #", PACKAGES),
    ),
    *under(
        "swinaccel",
        ("ops/packaged.py", "if _is_packaging() and", "if", PACKAGES),
        ("ops/packaged.py", "sizes.pop(0)", "sizes[0]", PACKAGES),
        ("ops/packaged.py", "if any(map(_name, (*sizes, *one.stride()))):", "if False:", PACKAGES),
        ("ops/block.py", "if bound is not TracedLaunch:", "if True:", PACKAGES),
        ("backends/triton/sequence.py", "bound is None and _describable", "_describable", PACKAGES),
    ),
    *under(
        "kernels/triton",  # products of 8 bits
        ("quantise.py", "tl.maximum(tl.max(tl.abs(tile), axis=1), 1e-30)", "tl.max(tl.abs(tile), axis=1)", FP8),
        ("quantise.py", "largest / 448.0, mask", "largest / 449.0, mask", FP8),
        ("quantise.py", "proj_ptr, pid - END_QKV", "proj_ptr, pid - END_QKV - 1", FP8),
        ("quantise.py", "scale_ptr + QKV + C + HIDDEN", "scale_ptr + QKV + C", FP8),
    ),
    *under(
        "swinaccel",
        ("ops/fp8.py", "before if self._post_norm else after)", "after)", FP8),
        ("ops/fp8.py", "self._row(self._active, _product(y, fc1", "self._row(self._attended, _product(y, fc1", FP8),
        ("runtime/precision.py", "if versions != known.versions:", "if not known.versions:", FP8),
        ("runtime/precision.py", "known.reason = known.failure or self._excess()", "known.reason = known.failure", FP8),
        ("runtime/precision.py", "return out if known.reason is None else expected", "return out", FP8),
        ("runtime/precision.py", "if not math.isfinite(error):", "if False:", FP8),
        ("runtime/precision.py", "if is_captured(x):", "if False:", FP8),
        (
            "runtime/precision.py",
            "            known.reason = reason\n            return plain",
            "            return plain",
            FP8,
        ),
        ("runtime/call.py", "precision.note(adapter, module, config, made)", "pass", FP8),
        ("runtime/call.py", "precision.note(adapter, module, config, None)", "pass", FP8),
        ("verify.py", '"precision": "model"}', '"precision": "fp8"}', FP8),
    ),
    *under(
        "swinaccel/trust",  # what is proven of a kind of module
        ("copies.py", "Setting(factor=1e3), ", "", REFUSED),
        ("copies.py", "Setting(factor=1e-3), ", "", REFUSED),
        ("copies.py", ", Setting(training=True, grad=True))", ")", REFUSED),
        ("copies.py", "1.25 * number + 0.05", "number", REFUSED),
        ("copies.py", "value + torch.rand_like(value) if", "value if", REFUSED),
        ("copies.py", "memo[id(hooks)] = OrderedDict()", "pass", GAPS + " -k hooks"),
        ("copies.py", "if not name.startswith(_COMPOSABLE)", "", SHARDING),
        ("libraries.py", "in unsharded_class(type(module)).__mro__:", "in type(module).__mro__:", SHARDING),
        ("copies.py", "torch.random.fork_rng(devices=[])", "ExitStack()", "tests/api/test_patching.py -k random"),
        ("copies.py", "    Setting(dtype=torch.float16),\n", "", HOST + " -k refused"),
        ("copies.py", "autocast=True)", "autocast=False)", HOST + " -k refused"),
        ("copies.py", "    Setting(grad=True),\n", "", VERDICTS + " -k modes"),
        ("copies.py", "    Setting(training=True),\n", "", VERDICTS + " -k modes"),
        ("copies.py", ".to(setting.dtype), setting.is_exact)", ".to(setting.dtype))", VERDICTS + " -k modes"),
        (
            "copies.py",
            ".to(setting.dtype), setting.is_exact)",
            ".to(setting.dtype), setting.grad)",
            VERDICTS + " -k modes",
        ),
        ("copies.py", "Setting(dtype=torch.float32, odd=True)", "Setting(dtype=torch.float32)", HOST + " -k refused"),
        ("compare.py", " or _other_state(clone, other)", "", REFUSED),
        ("compare.py", "if one.dtype != other.dtype:", "if False:", VERDICTS + " -k dtypes"),
        ("compare.py", "if differs is None and setting.grad", "if False", REFUSED),
        ("probe.py", "for rate in (0.0, 0.2) if", "for rate in (0.0,) if", REFUSED),
        (
            "probe.py",
            "key = (*key, fingerprint(module.named_modules(), methods))",
            "pass",
            VERDICTS + " -k 'outside or nothing'",
        ),
        (
            "trial.py",
            "raise Inconclusive(section)\n    if section.padding",
            "return section\n    if section.padding",
            VERDICTS + " -k nothing",
        ),
        ("probe.py", "for one in _with_helpers(function):", "for one in (function,):", VERDICTS + " -k cpu"),
        ("names.py", 'names |= {"device.type"} if', "names |= set() if", VERDICTS + " -k cpu"),
        ("probe.py", "for default_scale in (False, True):", "for default_scale in (False,):", VERDICTS + " -k scale"),
        ("probe.py", "return frozenset(raised - taken) if taken else", "return", COPIES + " -k birefnet"),
        ("probe.py", "for power in (0, 1, 2):", "for power in (0, 1):", COPIES + " -k without"),
        ("probe.py", 'if "bias" in self.without:', "if True:", FORMS),
        ("probe.py", "if drops and not setting.training:", "if False:", FORMS),
        ("dropping.py", '("itself", "all") if', '("itself",) if', FORMS),
        (
            "dropping.py",
            "for name in (*drops, *numbers):\n            settings",
            "for name in drops:\n            settings",
            FORMS,
        ),
        ("probe.py", 'if "mask" in self.without else found', "", FORMS),
        ("registry.py", "if self.refused and mask_kind", "if False and mask_kind", COPIES + " -k 'refuses or windows'"),
        ("registry.py", "self.refused | other.refused", "self.refused", COPIES + " -k refuses"),
        ("registry.py", "return both if same else _TWO_WAYS", "return both", VERDICTS + " -k two_scales"),
        (
            "registry.py",
            "self.rate)(attention) if attention.training else",
            "self.rate)(attention) if True else",
            COPIES,
        ),
        ("probe.py", "Widened() if narrows and", "Widened() if False and", COPIES + " -k another"),
        ("copies.py", "asked = func is Tensor.float or (", "asked = (", COPIES + " -k another"),
        (
            "dropping.py",
            "heard.append(rate if is_weights else -rate)",
            "heard.append(rate)",
            "tests/trust/test_switches_in_numbers.py",
        ),
        ("dropping.py", "if len(heard) == 1 else 0.0", "if heard else 0.0", "tests/trust/test_switches_in_numbers.py"),
        (
            "dropping.py",
            "holds = _given_rate(subject.original, clone, arguments) == rate",
            "holds = True",
            COPIES + " -k taken",
        ),
        ("probe.py", "_replaced(parts) or _unseen(parts)", "_replaced(parts)", VERDICTS + " -k cpu"),
        ("registry.py", "scale=section.head_dim**-0.5", "scale=section.scale", VERDICTS + " -k scale"),
        ("registry.py", "if self.default_scale and", "if", "tests/runtime/test_traps_of_scores.py -k scale"),
        ("fingerprint.py", "watched=not is_library)", "watched=False)", FINGERPRINT),
        ("fingerprint.py", "yield name, _sign_and_kind(value)", "pass", "tests/trust/test_switches_in_numbers.py"),
        (
            "fingerprint.py",
            "number < 0, number == 0, math.isfinite(number)",
            "number == 0, math.isfinite(number)",
            "tests/trust/test_switches_in_numbers.py",
        ),
        ("fingerprint.py", "self.contents.append((value, dict(value)))", "pass", VERDICTS + " -k registered"),
        ("fingerprint.py", "self._watch(namespace, name)", "pass", VERDICTS + " -k outside"),
        ("fingerprint.py", "self._watch(vars(value), name)", "pass", SETTINGS),
        ("fingerprint.py", "or self._version != other._version", "", FINGERPRINT),
        ("names.py", "                names |= names_in(constant)", "                pass", FINGERPRINT),
        ("names.py", "isinstance(constant, str) and constant.isidentifier()", "False", FINGERPRINT),
        ("names.py", "for one in (value.fget, value.fset) if", "for one in (value.fset,) if", FINGERPRINT),
        ("names.py", "        yield value.__func__", "        return", FINGERPRINT),
        ("names.py", "        yield value.func\n", "        return\n", FINGERPRINT),
        ("names.py", "isinstance(one, types.FunctionType) and one.__code__ is not code:", "False:", FINGERPRINT),
        ("names.py", "if inner is not function and inner.__code__ is function.__code__:", "if False:", FINGERPRINT),
        ("fingerprint.py", "return type(value), repr(value) if", "return repr(value) if", FINGERPRINT),
        (
            "fingerprint.py",
            "            if depth:\n                raise",
            "            if False:\n                raise",
            SETTINGS,
        ),
        ("fingerprint.py", "if isinstance(value, _PER_THREAD):", "if False:", HOST + " -k thread"),
        ("fingerprint.py", "if value not in self._modules and not is_of_library(value):", "if False:", FINGERPRINT),
        ("fingerprint.py", "self.cells += ((value, name, one) for name, one in extra.items())", "pass", SETTINGS),
        ("fingerprint.py", "                self.cells.append((value, name, one))", "                pass", SETTINGS),
        ("fingerprint.py", 'self.cells.append((cell, "cell_contents", value))', "pass", SETTINGS),
        ("fingerprint.py", "            self.contents.append((value, value.copy()))", "            pass", SETTINGS),
        (
            "fingerprint.py",
            "(*(function.__defaults__ or ()), *(function.__kwdefaults__ or {}).values())",
            "()",
            FINGERPRINT,
        ),
        ("fingerprint.py", "(value.func, *value.args, value.keywords)", "(value.func, *value.args)", FINGERPRINT),
        ("fingerprint.py", "[one for one in type.mro(type(cls)) if one not in (type, object)]", "[]", SETTINGS),
        ("probe.py", "found = _speaks_of(parts, _UNSEEN)", "found = None", "tests/trust/test_verdicts.py -k cpu"),
        (
            "probe.py",
            "except (MemoryError, torch.OutOfMemoryError) as error:",
            "except ZeroDivisionError as error:",
            HOST + " -k memory",
        ),
        ("probe.py", "return PADDED if empty else None", "return None", HOST + " -k padded"),
        ("trial.py", "id(tensor) not in known and id(tensor._base) not in known:", "False:", HOST + " -k computed"),
        (
            "trial.py",
            "if section.index is not None and tensor.data_ptr() ==",
            "if True or tensor.data_ptr() ==",
            "tests/runtime/test_switches.py -k counters",
        ),
        (
            "probe.py",
            "if any(tensor.is_meta for",
            "if False and any(tensor.is_meta for",
            "tests/api/test_lifetime.py -k meta",
        ),
        ("copies.py", "(numbers - 100 * (torch.rand(argument) < 0.5))", "numbers", REFUSED),
        (
            "copies.py",
            "                memo[id(one)] = value + torch.rand_like(value)",
            "                memo[id(one)] = value",
            HOST + " -k refused",
        ),
        ("copies.py", "stack.enter_context(torch.inference_mode(False))", "pass", HOST + " -k surrounds"),
        (
            "compare.py",
            "if not torch.equal(finite, other.isfinite()):",
            "if False:",
            "tests/trust/test_verdicts.py -k dtypes",
        ),
        (
            "compare.py",
            '            if one is not other:\n                return f"{name} has',
            '            if False:\n                return f"{name} has',
            HOST + " -k refused",
        ),
        (
            "compare.py",
            " or _plain_part(left.get(name)) != _plain_part(right.get(name))",
            "",
            "tests/runtime/test_switches.py -k counters",
        ),
        (
            "registry.py",
            "            self._readings[key] = both\n            self.count += 1",
            "            self._readings[key] = both",
            HOST + " -k proven",
        ),
        ("registry.py", "if getattr(part, last) and (", "if False and (", REFUSED),
        ("registry.py", " or name in self.always", "", FORMS),
        (
            "registry.py",
            "        _make_room(self._verdicts)",
            "        pass",
            "tests/trust/test_fingerprint.py -k registry",
        ),
        ("registry.py", "if part is module or part in inside]", "if part in inside]", HOST + " -k around"),
        ("libraries.py", "or _has_code(base))", "or False)", VERDICTS + " -k dtypes"),
    ),
    *under(
        "swinaccel/runtime",  # what decides about a call
        ("attention.py", "high >= rows", "high > rows", GAPS + " -k rows"),
        ("attention.py", "low < 0 or ", "", EDITS + " -k index"),
        ("attention.py", "len(shape) not in (2, 3) or shape[-1] != heads", "len(shape) != 2", HOST + " -k shapes"),
        ("attention.py", "section.logit_scale.numel() != heads", "False", HOST + " -k shapes"),
        (
            "attention.py",
            "if has_hooks(part) and (place or not is_called):",
            "if False:",
            EDITS + " -k forward_pre-attn",
        ),
        ("attention.py", "for one in (x, *attention.parameters())", "for one in (x,)", GAPS + " -k alone"),
        ("attention.py", "if section.dropout > 0:", "if False:", "tests/runtime/test_dispatch.py -k dropout"),
        (
            "attention.py",
            "mask is not None and mask.requires_grad",
            "False",
            ("tests/runtime/test_dispatch.py tests/runtime/test_reports.py -k gradient"),
        ),
        ("attention.py", "and section.padding is None:", "and False:", HOST + " -k padded"),
        (
            "section.py",
            "        or projection._compiled_call_impl is not None\n        or not are_functions_torchs()\n",
            "",
            GAPS + " -k modules",
        ),
        (
            "section.py",
            "not trained and biases.wanted(self.config)",
            "biases.wanted(self.config)",
            "tests/bias/test_bias.py -k training",
        ),
        (
            "section.py",
            "None if trained or section.position is None else",
            "None if section.position is None else",
            "tests/runtime/test_training.py -k gradients",
        ),
        ("context.py", "if _has_any_global_hook():", "if False:", EDITS + " -k all-hooks"),
        ("context.py", "forward_ad._current_level >= 0", "False", "tests/runtime/test_dispatch.py -k forward_mode"),
        ("context.py", "_interpreter_stack() is not None", "False", "tests/runtime/test_dispatch.py -k transforms"),
        ("context.py", "_active_mode(_PROXY) is not None", "False", HOST + " -k graphs"),
        (
            "context.py",
            "namespace[name] is value for",
            "True for",
            ("tests/api/test_gaps.py tests/runtime/test_memory.py -k all_modules"),
        ),
        ("context.py", "x.requires_grad, x.is_contiguous()", "x.is_contiguous()", HOST + " -k alone"),
        ("context.py", "torch.is_grad_enabled(), torch.is_inference", "True, torch.is_inference", HOST + " -k alone"),
        ("context.py", "inference_mode_enabled(), autocast", "inference_mode_enabled(), None", HOST + " -k autocast"),
        ("guard.py", "and self._has_settings()", "", "tests/runtime/test_plans.py -k Guard"),
        ("guard.py", "and not any(self._empty)", "", "tests/runtime/test_plans.py -k Guard"),
        ("guard.py", "list(map(type, self.modules)) == self._types", "True", EDITS + " -k attention-class-eager"),
        ("guard.py", "and all(map(is_, map(_forward, self._classes), self._forwards))", "", EDITS + " -k class-one"),
        ("guard.py", "and all(map(is_, kept, self._kept))", "", "tests/runtime/test_plans.py -k Guard"),
        (
            "guard.py",
            "list(map(Tensor.data_ptr, self._buffers)) == self._pointers",
            "True",
            "tests/runtime/test_plans.py -k Guard",
        ),
        ("guard.py", "list(map(_version, self.values)) == self._versions", "True", HOST + " -k guard"),
        ("guard.py", "and all(map(is_, map(getitem, *self._cells), self._watched))", "", VERDICTS + " -k outside"),
        ("guard.py", "and self._contents == self._copies", "", VERDICTS + " -k outside"),
        ("guard.py", "return value.copy()", "return value", HOST + " -k guard"),
        ("plan.py", "self.failures == failures.count\n            and", "True\n            and", HOST + " -k failed"),
        ("plan.py", "and self._fits(*self._tensors)", "", HOST + " -k shapes"),
        ("plan.py", "_version(self._index) == self._version", "True", EDITS + " -k index"),
        ("plan.py", " and plan.is_reusable", "", "tests/runtime/test_plans.py -k masks_of"),
        (
            "context.py",
            "value.requires_grad, value.stride()",
            "value.requires_grad",
            "tests/runtime/test_plans.py -k masks_of",
        ),
        ("context.py", '"tensor", value.shape, value', '"tensor", value', "tests/runtime/test_plans.py -k masks_of"),
        ("attention.py", "section.mask = mask.new_empty(0)", "pass", "tests/runtime/test_plans.py -k masks_of"),
        ("plan.py", "len(self.plans) >= _MOST_PLANS", "False", GAPS + " -k never"),
        ("plan.py", "root.__dict__ is not module.__dict__ or", "", "tests/runtime/test_memory.py -k attributes"),
        ("context.py", "tokens is not x or ", "", HOST + " -k another_tensor"),
        ("call.py", "state.fallbacks += 1", "pass", "tests/runtime/test_dispatch.py -k remembered"),
        ("context.py", "return entry, settings, x.shape", "return entry, x.shape", HOST + " -k sizes"),
        ("block.py", "not is_leaf or does_nothing(part)", "True", HOST + " -k known"),
        ("block.py", "require(not drops_now(part),", "require(True,", EDITS + " -k dropout"),
        ("block.py", "or not tensor.is_contiguous():", ":", HOST + " -k contiguous"),
        (
            "block.py",
            "(x.requires_grad or any(one.requires_grad for one in parameters))",
            "x.requires_grad",
            (
                "tests/runtime/test_fusion.py "
                "tests/runtime/test_fused_steps.py "
                "tests/runtime/test_unfused_steps.py -k 'gradients or training'"
            ),
        ),
        (
            "guard.py",
            "and list(chain.from_iterable(filled)) == self._names",
            "",
            "tests/runtime/test_plans.py -k names",
        ),
        ("guard.py", "and all(getattr(one, name, None) is value for one, name, value in self._fields)", "", SETTINGS),
        ("guard.py", "return now == then and others == self._settings[1:]", "return now == then", HOST + " -k guard"),
        ("guard.py", "owners.append(value)  # a configuration", "pass", "tests/runtime/test_plans.py -k Guard"),
        (
            "plan.py",
            "(isinstance(self.facts, str) and self._proof_count != registry.count)",
            "False",
            HOST + " -k proven",
        ),
        ("plan.py", "        if self._guards_left:", "        if True:", "tests/runtime/test_memory.py -k changing"),
        ("plan.py", " or type(root) is not type(module)", "", HOST + " -k hand"),
        ("plan.py", "None if self.guard is None else facts  #", "facts  #", HOST + " -k kept"),
        ("plan.py", "found.holds() and self.holds(module) else", "found.holds() else", EDITS + " -k attention"),
        (
            "call.py",
            "reason = None if plan.failures == failures.count else failures.get(plan.problem)",
            "reason = None",
            HOST + " -k failed",
        ),
        (
            "call.py",
            'raise NotFusable("it was changed after accelerate(); call accelerate() again")',
            "pass",
            EDITS + " -k 'block-class or block-child'",
        ),
        (
            "call.py",
            "isinstance(reading, str) or reading.active(inner) is not None:",
            "isinstance(reading, str):",
            GAPS + " -k place",
        ),
        ("call.py", "fused.counted.calls += 1", "pass", "tests/runtime/test_reports.py -k counts"),
        ("section.py", " or one.dtype is not bound.dtype or", " or", HOST + " -k bound"),
        ("section.py", "if (table.stride(), table.dtype) != bound.layout:", "if False:", HOST + " -k bound"),
        (
            "section.py",
            "if (first.shape[-1] != 3 * width) if first is qkv else",
            "if False if first is qkv else",
            ('tests/runtime/test_odd_tensors.py tests/runtime/test_dispatch.py -k "shapes or projection"'),
        ),
        ("section.py", "all(one is None or one.is_contiguous() for one in others)", "True", HOST + " -k gaps"),
        ("section.py", "            and not section.dropout\n", "", HOST + " -k dropout_is"),
        (
            "section.py",
            "table if any(table is one for one in section.sources) else None",
            "table",
            EDITS + " -k attention",
        ),
        ("weights.py", "for reference in one.family:", "for reference in ():", COPIES + " -k earlier"),
        (
            "weights.py",
            "weight, bias = map(copied, _projection(section) or ())",
            "weight, bias = _projection(section) or ()",
            "tests/families/test_returned_weights.py -k weights",
        ),
        ("weights.py", "image = image.clone()", "pass", COPIES + " -k returns"),
        ("weights.py", "    if torch.is_grad_enabled():", "    if False:", COPIES + " -k left"),
        ("weights.py", "    if section.dropout > 0:", "    if False:", COPIES + " -k left"),
        ("weights.py", "if torch.is_autocast_enabled(x.device.type) or", "if", COPIES + " -k left"),
        ("traced.py", "isinstance(reading, str) or reading.weights", "False", COPIES + " -k left"),
        (
            "traced.py",
            "or _changed_reason(id(family), id(type(module)))",
            "or None",
            EDITS + " -k 'method-compiled or class-attention'",
        ),
        (
            "traced.py",
            "tokens is not None and _are_proven(id(adapter), id(type(module)))",
            "tokens is not None",
            EDITS + " -k class-norm1",
        ),
        ("traced.py", "if not _has_settings(proven, part):", "if False:", EDITS + " -k 'unknown or softmax-axis'"),
        ("traced.py", "not is_sure:", "not is_of_library(module):", FORMS),
        ("call.py", "kwargs = _input_first(original, kwargs)", "pass", FORMS + " -k order"),
        ("traced.py", ' or ("always", type(holder), name) in proven', "", FORMS),
        ("traced.py", 'if fact[0] == "rate" and fact[1] is type(module) and', "if False and", FORMS),
        (
            "attention.py",
            "if value and (place or rate != known):",
            "if False:",
            "tests/trust/test_verdicts_of_layers.py -k rates",
        ),
        ("attention.py", "mask is not None and not mask.is_floating_point()", "False", EDITS + " -k mask-int64"),
        (
            "attention.py",
            "mask is not None and tuple(mask.shape) != (geometry.num_windows, tokens, tokens)",
            "False",
            EDITS + " -k mask-size",
        ),
        (
            "attention.py",
            "if not all(0 <= shift < window",
            "if False and not all(0 <= shift < window",
            EDITS + " -k shift-outside",
        ),
        ("attention.py", "inside += [part for part in", "inside += [] and [part for part in", HOST + " -k watched"),
        ("block.py", "if type(tensor) not in PLAIN_TENSORS or not fits", "if not fits", HOST + " -k around_an"),
        ("block.py", "require(not has_hooks(part),", "require(True,", EDITS + " -k block-hook"),
        ("block.py", "require(not replaced_methods(part),", "require(True,", HOST + " -k around_an"),
        (
            "block.py",
            "(norm.normalized_shape, *shapes))",
            "(norm.normalized_shape,))",
            "tests/runtime/test_odd_tensors.py -k norms",
        ),
        ("block.py", "tuple(layer.bias.shape) == (fan_out,)", "True", EDITS + " -k block-bias-size"),
        ("block.py", "is_drop = is_of_library(part) and (", "is_drop = (", HOST + " -k around_an"),
    ),
    *(
        Mutant(f"swinaccel/runtime/{file}.py", old, new, tests)
        for file, old, new, tests in (
            ("graphs", "if capture.is_safe() and (", "if (", GRAPHS),
            ("graphs", "if not capture.looks_after or capture.holds(module):", "if True:", GRAPHS),
            ("graphs", "if capture is None or not capture.is_free():", "if capture is None:", TRAINING_GRAPHS),
            (
                "graphs",
                "if not capture.is_free() or not capture.is_safe():",
                "if not capture.is_safe():",
                TRAINING_GRAPHS,
            ),
            ("graphs", "if not capture.is_free() or not capture.is_safe():", "if not capture.is_free():", GRAPHS),
            ("graphs", "found is not None and found[0] == key", "found is not None", GRAPHS),
            ("graphs", "if self._goes_ahead and capture.holds(module):", "if self._goes_ahead:", GRAPHS),
            ("graphs", "if not capture.fits(*args) or", "if", GRAPHS),
            ("capture", "torch.distributed.is_available() and torch.distributed.is_initialized()", "False", GRAPHS),
            ("graphs", "self._rehearsed.add(mode)", "pass", GRAPHS),
            ("graphs", "torch.is_inference_mode_enabled(), autocast", "autocast", GRAPHS),
            ("graphs", "(kinds, form, rest, modes, _settings())", "(kinds, form, rest, modes)", GRAPHS),
            ("graphs", "(one.shape, one.stride(), one.dtype", "(one.shape, one.dtype", GRAPHS),
            ("graphs", "torch._C._current_graph_task_id() == -1", "True", GRAPH_CONTENTS),
            ("graphs", "torch._C._autograd._top_saved_tensors_default_hooks(False) is None", "True", GRAPH_CONTENTS),
            ("capture", "[one.clone() for one in self._outputs]", "list(self._outputs)", GRAPHS),
            ("capture", "self._where() == self._places and self.is_safe()", "self.is_safe()", GRAPHS),
            ("capture", "with _without_autocast_cache(), ", "with ", GRAPHS),
            ("capture", "        with engine.lock:", "        if True:", GRAPHS),
            ("capture", "is_same and self._failures == failures.count and", "is_same and", GRAPHS),
            ("capture", "self._guard.tensors() + self._guard.values", "self._guard.tensors()", GRAPHS),
            ("capture", "self.looks_after &= not statistics", "pass", GRAPH_CONTENTS),
            ("capture", "set_random_state(self._device, self._drawn_from)", "pass", GRAPH_CONTENTS),
            ("capture", "if host_state(self._device) != hosts:", "if False:", GRAPH_CONTENTS),
            ("capture", "or self._where() != self._places:", "or False:", GRAPH_CONTENTS),
            ("training_capture", "if not guard.holds() or", "if", GRAPH_CONTENTS),
            ("training_capture", "or [one.data_ptr() for one in twin.parameters()] != places", "", GRAPH_CONTENTS),
            ("training_capture", "acquire(timeout=_PATIENCE)", "acquire()", GRAPH_CONTENTS),
            ("training_capture", "is_latest = self._turn() is turn", "is_latest = True", TRAINING_GRAPHS),
            ("training_capture", "copies = list(map(torch.empty_like, kept))", "copies = kept", TRAINING_GRAPHS),
            ("training_capture", "super().lies() and self._wanted() == self._flags", "super().lies()", TRAINING_GRAPHS),
            ("training_capture", "own.zero_()", "pass", TRAINING_GRAPHS),
            ("training_capture", "set_random_state(self._device, turn.random_state)", "pass", TRAINING_GRAPHS),
            ("rehearsal", "state.precision.become(known or Precision())", "pass", FP8 + " -k rehearsed"),
            ("rehearsal", "one.data.copy_(kept)", "pass", TRAINING_GRAPHS),
            ("rehearsal", "space.update(then)", "pass", GRAPH_CONTENTS),
            ("rehearsal", "values[:] = old", "pass", GRAPH_CONTENTS),
            ("rehearsal", "parameter.data = alike", "pass", GRAPH_CONTENTS),
            ("rehearsal", "random.setstate(state)", "pass", GRAPH_CONTENTS),
            ("capture", "unsharded_class(type(one)) is not type(one)", "False", SHARDING + " -k graph"),
        )
    ),
    *under(
        "swinaccel/backends/torch/products.py",
        *(
            ("", old, new, "tests/backends/test_products.py")
            for old, new in (
                ('torch.get_float32_matmul_precision() == "highest"', "True"),
                ("and torch._C._get_mkldnn_enabled()", ""),
                ("and torch._C._len_torch_dispatch_stack() == 0", ""),
                ('and not torch.is_autocast_enabled("cpu")', ""),
                ("bias.shape == weight.shape[:1] and", ""),
                ("all(type(one) in PLAIN_TENSORS for one in given)", "True"),
                (" or not weight.is_contiguous() or", " or"),
                ("(x.requires_grad or weight.requires_grad)", "x.requires_grad"),
                ("(torch.is_grad_enabled() and bias.requires_grad)", "False"),
            )
        ),
    ),
    *under(
        "swinaccel",
        ("api.py", "is True and not is_wrapper)", "is True)", SHARDING + " -k ddp"),
        ("families/shared/near.py", "isinstance(child, nn.Unfold)", "False", "tests/families/test_near.py -k unfolded"),
        # Weather models.
        ("functional.py", "period = windows if rows % period else rows", "period = rows", ROWS),
        ("functional.py", "bias = bias[torch.arange(windows, device=bias.device) % bias.shape[0]]", "pass", ROWS),
        ("backends/torch/windows.py", "term.repeat(period // term.shape[0], 1, 1, 1)", "term[:1]", ROWS),
        ("spec/reference.py", "bias.repeat_interleave(geometry.grid[-1], 0)", "bias", ROWS),
        ("families/aurora.py", "lora(x, step)", "lora(x, 0)", WEATHER + " -k aurora_at"),
        ("families/earth.py", "one.shape[1] != rows", "False", WEATHER + " -k earth_with_rows"),
        # Dispatchers and markers.
        (
            "patching.py",
            "        if MARKER in self.__dict__:",
            "        if False:",
            "tests/api/test_lifetime.py -k proven",
        ),
        ("auto/__init__.py", "not is_compiling() and self not in seen", "self not in seen", "tests/api/test_auto.py"),
        ("auto/__init__.py", "if any(marker(part)", "if False and any(marker(part)", "tests/api/test_auto.py"),
        (
            "patching.py",
            "        if switch.is_open:",
            "        if False:",
            ("tests/api/test_compiling.py tests/api/test_patching.py tests/api/test_scopes.py -k disabled"),
        ),
        (
            "patching.py",
            "return torch._C._current_graph_task_id() != -1",
            "return False",
            "tests/api/test_compiling.py tests/api/test_patching.py tests/api/test_scopes.py -k disabled",
        ),
        (
            "patching.py",
            "idle - _keys_of_copies(idle)",
            "idle",
            ("tests/api/test_lifetime.py tests/api/test_patching.py -k copies"),
        ),
        (
            "patching.py",
            "if method in module.__dict__:",
            "if False:",
            "tests/trust/test_verdicts.py -k replaced_before",
        ),
        (
            "patching.py",
            "_is_off(compiling) or ((compiling or may_be_disabled()) and env_disabled())",
            "_is_off(compiling)",
            "tests/api/test_patching.py tests/api/test_scopes.py -k environment",
        ),
        ("patching.py", "if checkpoints and", "if False and", "tests/runtime/test_traps_of_calls.py -k checkpoints"),
        ("patching.py", "forget_state(module)", "pass", GAPS + " -k counts"),
        (
            "patching.py",
            "                delattr(cls, name)",
            "                pass",
            "tests/api/test_lifetime.py tests/api/test_patching.py -k nothing",
        ),
        ("patching.py", "os.register_at_fork(after_in_child=_renew_lock)", "pass", HOST + " -k fork"),
        # Operators.
        (
            "ops/window.py",
            "if twice or _is_batched(grad):",
            "if twice:",
            "tests/runtime/test_fused_steps.py -k batch",
        ),
        ("ops/window_plain.py", "if env_strict() or dropout:", "if env_strict():", HOST + " -k raised"),
        ("ops/window_plain.py", "strides == k.stride() == v.stride()", "True", HOST + " -k strides"),
        ("ops/window_plain.py", "strides[-1] == 1", "True", HOST + " -k strides"),
        (
            "ops/window.py",
            "table, padding, logit_scale)\n    )",
            "table, padding)\n    )",
            "tests/api/test_functional.py tests/backends/test_backward.py",
        ),
        ("ops/window_plain.py", '"index": _contiguous(index)', '"index": index', HOST + " -k gaps"),
        # What is bound to its launches.
        ("backends/triton/launches.py", "        if bits & 15:", "        if False:", "tests/backends/test_bound.py"),
        ("ops/window.py", "not count_modes() and not is_profiled()", "True", "tests/backends/test_bound.py"),
        ("ops/window.py", "_setting() == self._precision:", "True:", "tests/backends/test_bound.py"),
        (
            "ops/block.py",
            "norm_launch(mode, device, rows, channels, eps[1])",
            "norm_launch(mode, device, rows, channels, eps[0])",
            "tests/backends/test_bound.py",
        ),
        # Factors and their cache.
        ("bias/table.py", "None if tensor.is_inference() else tensor._version", "None", GAPS + " -k factors"),
        ("bias/cache.py", "info.st_uid != os.getuid()", "False", "tests/bias/test_bias_cache.py -k another"),
        (
            "bias/table.py",
            "rank == 0 or _enough(bias, q, k, dtype, energy)",
            "True",
            "tests/bias/test_bias_cache.py -k rule",
        ),
        # Families.
        ("families/timm.py", "dynamic or mask is not None else 0.0", "True else 0.0", GAPS + " -k mask"),
        ("families/timm_cr.py", "if coords.shape[0] != tokens * tokens:", "if False:", HOST + " -k coordinates"),
        (
            "families/shared/official.py",
            "attn.attn_drop.p if attn.training",
            "attn.attn_drop.p if attn.attn_drop.training",
            HOST + " -k mode",
        ),
        (
            "families/torchvision.py",
            "0 if side >= length else",
            "0 if side > length else",
            "tests/runtime/test_traps_of_scores.py tests/runtime/test_traps_of_windows.py -k clamp",
        ),
        (
            "families/torchvision.py",
            "torch.zeros_like(k_bias)",
            "k_bias",
            "tests/runtime/test_traps_of_projections.py tests/runtime/test_traps_of_scores.py -k bias",
        ),
        (
            "families/huggingface.py",
            "if not always_partition:",
            "if True:",
            "tests/runtime/test_traps_of_windows.py -k partition",
        ),
        (
            "families/video.py",
            "mask_matrix if geometry.is_shifted else None",
            "mask_matrix",
            "tests/families/test_families_3d.py",
        ),
        (
            "families/shared/common.py",
            "torch.zeros_like(attn.v_bias) if k_bias is None",
            "attn.v_bias if k_bias is None",
            (
                "tests/families/test_families.py "
                "tests/families/test_hidden_differences.py "
                "tests/families/test_other_forwards.py"
            ),
        ),
        (
            "families/shared/common.py",
            "not (dropout.training and dropout.p)",
            "True",
            "tests/runtime/test_traps_of_projections.py tests/runtime/test_traps_of_scores.py -k dropout",
        ),
        (
            "families/shared/common.py",
            'getattr(dropout, "p", 0.0) if dropout.training else 0.0',
            'getattr(dropout, "p", 0.0)',
            TRAPS + " tests/runtime/test_dispatch.py -k dropout",
        ),
        (
            "families/shared/common.py",
            " and tuple(table.shape) == (rows, num_heads)",
            "",
            "tests/families/test_near.py -k missing",
        ),
        (
            "families/shared/common.py",
            "hidden.bias.shape == (width,) and last.weight.shape == (num_heads, width)",
            "hidden.bias.shape == (width,)",
            "tests/runtime/test_odd_tensors.py",
        ),
        (
            "families/shared/common.py",
            "if tuple(logit_scale.shape) != (num_heads, 1, 1):",
            "if False:",
            "tests/runtime/test_odd_tensors.py -k logit",
        ),
        ("families/shared/common.py", " and type(activation) is nn.ReLU", " ", HOST + " -k share"),
        (
            "families/shared/common.py",
            "torch.cat((attn.q_bias, torch.zeros_like(attn.v_bias) if k_bias is None else k_bias",
            "torch.cat((attn.q_bias, torch.zeros_like(attn.v_bias)",
            "tests/runtime/test_traps_of_projections.py -k k_bias",
        ),
        (
            "families/shared/official.py",
            'getattr(attn, "use_flash_attention", False) and',
            "False and",
            HOST + " -k share",
        ),
        (
            "families/shared/official.py",
            "separate is not None and (separate or attn.q_bias is None)",
            "separate is not None and separate",
            HOST + " -k second_version",
        ),
        ("families/shared/official.py", "own if bias is None else own + bias", "own", HOST + " -k second_version"),
        (
            "families/shared/official.py",
            'getattr(attn, "rpe_output_type", "sigmoid" if hasattr(attn, "logit_scale") else "normal") == "sigmoid"',
            'hasattr(attn, "logit_scale")',
            COPIES + " -k another",
        ),
        (
            "families/shared/stacked.py",
            'if "mask" in name or name == names[1]',
            "if name == names[1]",
            COPIES + " -k 'another or keys'",
        ),
        ("families/shared/stacked.py", "not _is_same(value, others[name])", "value", FORMS),
        ("families/shared/stacked.py", "type(value) is type(default) and", "", FORMS),
        ("families/shared/stacked.py", "defaults[name] is None or name in needed", "True", FORMS),
        ("families/shared/stacked.py", "or not needed <= given.keys()", "", FORMS),
        ("families/shared/stacked.py", "or len(given) < len(args) + len(kwargs)", "", FORMS),
        ("families/shared/stacked.py", "{**others, mask:", "{**dict.fromkeys(others), mask:", FORMS),
        ("families/huggingface_attention.py", "        mask=mask,\n", "", COPIES + " -k unimer"),
        ("families/huggingface.py", "module.dropout(attend(image))", "attend(image)", TRAPS + " -k places"),
        ("families/huggingface_attention.py", " and is_idle(output.dropout)", "", TRAPS + " -k after"),
        ("families/renamed.py", "mask=mask,", "", COPIES + " -k another"),
        ("trust/compare.py", "(place or setting.drops) and", "place and", COPIES + " -k halves"),
        (
            "families/rectangles.py",
            "if any(isinstance(part, _DropoutNd)",
            "if False and any(isinstance(part, _DropoutNd)",
            COPIES + " -k halves",
        ),
        ("families/rectangles.py", "mask=mask,", "", COPIES + " -k halves"),
        ("families/rectangles.py", "dropout=drop_rate(module.attn_drop),", "", COPIES + " -k halves"),
        ("families/rectangles.py", "qkv.permute(1, 2, 0, 3)", "qkv.permute(1, 2, 3, 0)", COPIES + " -k halves"),
        ("families/mutual.py", "(q2, k1, v1), (q1, k2, v2)", "(q1, k1, v1), (q2, k2, v2)", COPIES + " -k another"),
        (
            "families/mutual.py",
            "F.scaled_dot_product_attention(q, k, v, mask,",
            "F.scaled_dot_product_attention(q, k, v,",
            COPIES + " -k another",
        ),
        ("families/restoration.py", "if module.input_resolution != x_size:", "if False:", COPIES + " -k rolls"),
        (
            "families/shared/official.py",
            "None if isinstance(attn.scale, (int, float)) else",
            "None if True else",
            HOST + " -k second_version",
        ),
        (
            "families/shared/shrinking.py",
            "length <= side for",
            "length < side for",
            'tests/families/test_families_3d.py -k "stage or torchvision"',
        ),
        (
            "families/shared/shrinking.py",
            "0 if fits else step for",
            "step for",
            'tests/families/test_families_3d.py -k "stage or torchvision"',
        ),
        (
            "families/shared/separate.py",
            "all(weight.requires_grad == first.requires_grad for weight in others)",
            "True",
            'tests/families/test_separate.py -k "training and not compile"',
        ),
        (
            "families/shared/separate.py",
            " or not all(map(is_plain_linear, projections))",
            "",
            "tests/families/test_separate.py -k plain",
        ),
        (
            "families/shared/separate.py",
            " and tensor.dtype == first.dtype for",
            "  for",
            "tests/families/test_separate.py -k together",
        ),
        ("families/shared/blocks.py", "    if geometry.is_padded:", "    if False:", HOST + " -k share"),
        ("families/shared/blocks.py", "or mask.dim() != 3 or", "or", HOST + " -k share"),
        ("families/shared/near.py", " or traits.has_class_token(axes)", "", "tests/families/test_near.py"),
        ("families/shared/near.py", " or not listed.isdisjoint(above)", "", "tests/families/test_near.py -k once"),
        (
            "families/shared/traits.py",
            "if num_heads > 1 and num_heads in shape:",
            "if False:",
            "tests/families/test_near.py -k missing",
        ),
        ("spec/arguments.py", " or known[1] != version", "", "tests/api/test_arguments.py -k entries_of"),
        ("spec/arguments.py", " or known[0]() is not index", "", HOST + " -k index"),
        (
            "spec/arguments.py",
            "if known[2] < 0 or known[3] >= rows:",
            "if known[3] >= rows:",
            "tests/api/test_arguments.py -k entries_of",
        ),
        (
            "spec/arguments.py",
            "if mask.requires_grad and torch.is_grad_enabled():",
            "if False:",
            "tests/api/test_functional_calls.py -k bad_",
        ),
        ("spec/arguments.py", " and sizes[-2] in (1, heads)", "", HOST + " -k factors"),
        (
            "spec/arguments.py",
            "        or torch._C._functorch.peek_interpreter_stack() is not None\n",
            "",
            HOST + " -k transform",
        ),
        (
            "spec/arguments.py",
            "if not 0 <= dropout < 1:",
            "if not 0 <= dropout <= 1:",
            "tests/api/test_functional_calls.py -k bad_",
        ),
        (
            "spec/arguments.py",
            "value.dtype != x.dtype and not torch",
            "False and not torch",
            "tests/api/test_arguments.py -k parameters",
        ),
        ("spec/arguments.py", "if value.shape != q.shape:", "if False:", "tests/api/test_functional_calls.py -k bad_"),
        (
            "backends/triton/checks.py",
            '    _expect("padding", problem.padding_shape, (3 * channels,))',
            "    pass",
            OPERATORS,
        ),
        (
            "backends/triton/checks.py",
            '    _expect("mask", problem.mask_shape, (geometry.num_windows, tokens, tokens))',
            "    pass",
            OPERATORS,
        ),
        (
            "backends/triton/checks.py",
            '    _expect("logit_scale", problem.logit_scale_shape, (heads,))',
            "    pass",
            OPERATORS,
        ),
        ("backends/triton/checks.py", '            _expect("lse", lse, lse_shape', "            (lse_shape", OPERATORS),
        (
            "backends/triton/checks.py",
            "expected = DTYPES if one is first else (first.dtype,)",
            "expected = DTYPES",
            OPERATORS,
        ),
        (
            "backends/triton/checks.py",
            "if problem.dropout and problem.seed_shape is None:",
            "if False:",
            HOST + " -k seed",
        ),
        ("backends/triton/checks.py", '    _expect("weight", weight, (heads, hidden))', "    pass", OPERATORS),
        ("backends/triton/checks.py", "if problem.causal and problem.block_size:", "if False:", OPERATORS),
        ("backends/triton/checks.py", "if one.device != first.device:", "if False:", HOST + " -k seed"),
        ("backends/torch/softmax.py", "softmax(q, k, v, start, scale) if has_zeros(out) else out", "out", NONFINITE),
        (
            "backends/torch/softmax.py",
            "torch.where(x.isfinite(), x.clamp(-limit, limit), x)",
            "x.clamp(-limit, limit)",
            NONFINITE + " -k wider",
        ),
        ("backends/torch/softmax.py", "torch.finfo(dtype).max / 2", "torch.finfo(dtype).max", HOST + " -k share"),
        ("bias/cache.py", '_flag("O_NOFOLLOW") | ', "", "tests/bias/test_bias_cache.py -k link"),
        ("bias/cache.py", "info.st_mode & 0o022", "info.st_mode & 0o002", "tests/bias/test_bias_cache.py -k group"),
        (
            "bias/cache.py",
            "        os.replace(temporary, path)",
            "        path.write_bytes(content)",
            "tests/bias/test_bias_cache.py -k one_step",
        ),
        ("bias/cache.py", "if _WARNED not in _told:", "if True:", "tests/bias/test_bias_cache.py -k kept"),
        (
            "bias/cache.py",
            "            os.unlink(temporary)",
            "            pass",
            "tests/bias/test_bias_cache.py -k kept",
        ),
        (
            "bias/cache.py",
            "        path.parent.mkdir(mode=0o700)\n",
            "        path.parent.mkdir()\n",
            "tests/bias/test_bias_cache.py -k private",
        ),
        (
            "bias/cache.py",
            "    except ValueError as error:\n        warn_once(str(error))",
            "    except ZeroDivisionError as error:\n        warn_once(str(error))",
            HOST + " -k none_is",
        ),
        ("cli/factory.py", "    except KeyboardInterrupt:\n        raise\n", "", HOST + " -k interrupt"),
        ("cli/factory.py", "    if path.is_dir():", "    if False:", "tests/cli/test_models.py -k folder"),
        ("cli/factory.py", "if isinstance(error, SystemExit):", "if False:", "tests/cli/test_models.py -k files"),
        (
            "cli/factory.py",
            "        inspect.signature(factory).bind()",
            "        pass",
            "tests/cli/test_models.py -k files",
        ),
        (
            "cli/factory.py",
            'getattr(module, "example_inputs", None) if given is None else given',
            "given",
            "tests/cli/test_models.py -k called_with",
        ),
        (
            "cli/factory.py",
            "    if not isinstance(model, nn.Module):",
            "    if False:",
            "tests/cli/test_models.py -k files",
        ),
        (
            "cli/factory.py",
            "            sys.path.remove(str(path.parent))",
            "            pass",
            "tests/cli/test_models.py -k files",
        ),
        (
            "ops/failures.py",
            "        self._reasons[problem] = reason\n        self.count += 1",
            "        self._reasons[problem] = reason",
            ('tests/runtime/test_dispatch.py tests/runtime/test_memory.py -k "kernel_failure or failed"'),
        ),
        (
            "ops/failures.py",
            "        self._reasons.clear()\n        self.count += 1",
            "        self._reasons.clear()",
            HOST + " -k forgotten",
        ),
        ("ops/failures.py", "if reason not in self._reasons.values():", "if True:", HOST + " -k forgotten"),
        (
            "ops/failures.py",
            "self._reasons.get(problem) if self._reasons else None",
            "next(iter(self._reasons.values()), None)",
            "tests/runtime/test_dispatch.py -k own_problem",
        ),
        ("patching.py", "        switch.is_open = False", "        pass", HOST + " -k context"),
        (
            "patching.py",
            "with suppress(ValueError, UnboundLocalError):",
            "with suppress(UnboundLocalError):",
            HOST + " -k context",
        ),
        (
            "patching.py",
            "if not isinstance(function, types.FunctionType) or isinstance(function, wrapt.BaseObjectProxy):",
            "if False:",
            "tests/api/test_patching.py -k wrapped",
        ),
        (
            "patching.py",
            "        return types.SimpleNamespace, ()",
            "        return _Runtime, ()",
            HOST + " -k pickled",
        ),
        (
            "patching.py",
            "_instances.setdefault(key, weakref.WeakSet()).add(module)",
            "pass",
            "tests/api/test_lifetime.py tests/api/test_patching.py -k copies",
        ),
        ("patching.py", "    if run is None:\n", "    if False:\n", HOST + " -k pickled"),
    ),
    *under(
        "kernels/triton",
        # Biases of rows of windows.
        ("tiles.py", "window.number // geometry.windows[2] % BIAS_ROWS", "window.number % BIAS_ROWS", ROWS),
        (
            "tiles.py",
            "number = (position // columns * BIAS_ROWS + row) * columns + position % columns",
            "number = position * BIAS_ROWS + row",
            ROWS,
        ),
        ("window_bwd.py", "bias_row = group % BIAS_ROWS", "bias_row = 0", ROWS),
        ("window_bwd_bias.py", "bias_row = tl.program_id(1) % BIAS_ROWS", "bias_row = 0", ROWS),
        ("window_bwd_bias.py", "bias, column, N, BIAS)", "bias, head, N, BIAS)", ROWS),
        # The kernel of two images.
        ("window_fwd.py", "k_ptr + stride_next,", "k_ptr,", GAPS + " -k two_images"),
        ("window_fwd.py", "v_ptr + stride_next,", "v_ptr,", GAPS + " -k two_images"),
        ("window_fwd.py", "tl.minimum(image + IMAGES - 1, batch - 1)", "image", GAPS + " -k two_images"),
        (
            "window_fwd.py",
            "next_state, next_q, k, v, attn_bias, dropout, next_instance,",
            "next_state, next_q, k, v, attn_bias, dropout, instance,",
            GAPS + " -k two_images",
        ),
        # Windows, shifts and masks.
        ("tiles.py", "& (shift[1] > 0)) | ((place[2]", "& (shift[1] > 1)) | ((place[2]", GAPS + " -k shifted"),
        ("tiles.py", "n % WINDOW[2] >= WINDOW[2] - shift[2]", "n % WINDOW[2] > WINDOW[2] - shift[2]", FUZZ),
        (
            "softmax.py",
            "tl.minimum(tl.maximum(narrow, -LIMIT), LIMIT), narrow)",
            "narrow, narrow)",
            GAPS + " -k lowest",
        ),
        (
            "tiles.py",
            "at = tl.where(at >= length, at - length, at)",
            "at = tl.where(at > length, at - length, at)",
            FUZZ,
        ),
        ("tiles.py", "(n < WINDOW[0] * WINDOW[1] * WINDOW[2]) & (real == 0)", "real == 0", NONFINITE + " -k padding"),
        (
            "tiles.py",
            "tl.load(logit_scale_ptr + head).to(tl.float32), LOG_100)",
            "tl.load(logit_scale_ptr + head).to(tl.float32), 9.0)",
            "tests/backends/test_backward.py -k clamped",
        ),
        (
            "tiles.py",
            "1.0 / tl.maximum(1.0 - probability, 1e-6)",
            "1.0",
            "tests/backends/test_operator_gradients.py -k dropout",
        ),
        ("bias.py", '0.0, float("-inf")))', "0.0, 0.0))", GAPS + " -k 'not two'"),
        ("softmax.py", 'mask=offs < N, other=float("inf"))', "mask=offs < N, other=0.0)", GAPS + " -k 'not two'"),
        # The last tile of a window that is no multiple of one.
        ("window_fwd.py", "tl.range(0, N, BLOCK_N)", "tl.range(0, N - BLOCK_N + 1, BLOCK_N)", GAPS + " -k 'not two'"),
        (
            "window_bwd_large.py",
            "tl.range(0, N, BLOCK_M)",
            "tl.range(0, N - BLOCK_M + 1, BLOCK_M)",
            GAPS + " -k 'not two'",
        ),
        (
            "window_bwd_large.py",
            "tl.range(0, N, BLOCK_N)",
            "tl.range(0, N - BLOCK_N + 1, BLOCK_N)",
            GAPS + " -k 'not two'",
        ),
        (
            "bias.py",
            "tl.range(0, N, BLOCK)",
            "tl.range(0, N - BLOCK + 1, BLOCK)",
            "tests/backends/test_backward.py -k table",
        ),
        (
            "softmax.py",
            "return tl.minimum(x, limit, propagate_nan=tl.PropagateNan.ALL)",
            "return tl.minimum(x, limit)",
            NONFINITE,
        ),
        (
            "softmax.py",
            "return tl.maximum(x, limit, propagate_nan=tl.PropagateNan.ALL)",
            "return tl.maximum(x, limit)",
            NONFINITE,
        ),
        ("softmax.py", " + grad_out * 0.0, axis=1", ", axis=1", NONFINITE),
        ("softmax.py", 'return tl.abs(x) < float("inf")', 'return x < float("inf")', NONFINITE),
        # Gradients.
        (
            "softmax.py",
            "(scores - maximum) * exponent - log_sum",
            "scores * exponent - (log_sum + maximum * exponent)",
            GAPS + " -k 'not two'",
        ),
        (
            "window_bwd.py",
            "clamped = inverse > 0.9999e12",
            "clamped = inverse > 1e38",
            "tests/backends/test_backward.py -k tiny",
        ),
        (
            "window_bwd.py",
            "<= LOG_100, grad_scale, 0.0)",
            "<= 90.0, grad_scale, 0.0)",
            "tests/backends/test_backward.py -k clamped",
        ),
        ("window_bwd_large.py", "residual[:, None] * mean_key", "0.0 * mean_key", "tests/backends/test_backward.py"),
        (
            "window_bwd_large.py",
            "delta + residual, mask",
            "delta, mask",
            "tests/backends/test_backward.py -k 'low or mean'",
        ),
        ("sequence_fwd.py", "seen = total != 0", "seen = total >= 0", "tests/backends/test_sequence.py"),
        (
            "sequence_bwd.py",
            "ds = only_visible(ds, offs_m, visible, 0.0)",
            "ds = ds",
            "tests/backends/test_nonfinite.py",
        ),
        (
            "sequence_fwd.py",
            "(block + window_blocks) * block_size, num_tokens",
            "(block + window_blocks) * block_size - 1, num_tokens",
            "tests/backends/test_sequence.py -k any_block",
        ),
    ),
]


class Outcome(NamedTuple):
    mutant: Mutant
    word: str  # of WORDS
    detail: str = ""


@contextmanager
def copied_tree() -> Iterator[Path]:
    """A copy of the tree, whose package is the one that is imported by what runs in it."""
    with tempfile.TemporaryDirectory(prefix="mutant-") as folder:
        tree = Path(folder) / "tree"
        ignored = shutil.ignore_patterns(".git", "__pycache__", ".*_cache", "*.egg-info", "build", "dist")
        shutil.copytree(ROOT, tree, ignore=ignored)
        (tree / "swinaccel" / "kernels").symlink_to(tree / "kernels" / "triton", target_is_directory=True)
        yield tree


class Done(NamedTuple):
    returncode: int | None  # None: it ran into the time limit
    output: str


def run_tests(tree: Path, tests: str, timeout: float) -> Done:
    """Run tests in a process of their own, forked from one that has imported what the tests do."""
    log = tree.parent / "log"
    process = FORKS.Process(target=run_pytest, args=(str(tree), shlex.split(tests), str(log)))
    process.start()
    process.join(timeout)
    if process.is_alive():
        process.kill()
        process.join()
        return Done(None, log.read_text())
    return Done(process.exitcode, log.read_text())


def run_pytest(tree: str, tests: list[str], log: str) -> None:
    with open(log, "w") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    os.chdir(tree)
    sys.path[:] = [tree, *(place for place in sys.path if not place.startswith(str(ROOT)))]
    os.environ.update(PYTHONPATH=tree, PYTHONDONTWRITEBYTECODE="1")
    sys.dont_write_bytecode = True
    sys.exit(int(pytest.main(["-q", "-x", "-p", "no:cacheprovider", "-W", "ignore", *tests])))


def is_current(mutant: Mutant) -> bool:
    path = ROOT / mutant.file
    return path.exists() and path.read_text().count(mutant.old) == 1


def described(mutant: Mutant) -> str:
    return f"{mutant.file}: {mutant.old!r} -> {mutant.new!r}  "


def tried(mutant: Mutant, timeout: float, earlier: list[str]) -> Outcome:
    """Run the tests of a mutant where it lives."""
    if not is_current(mutant):
        return Outcome(mutant, "out of date")
    for line in earlier:
        if line.startswith(f"{'caught':11} {described(mutant)}"):
            return Outcome(mutant, "caught", line.removeprefix(f"{'caught':11} {described(mutant)}"))
    with copied_tree() as tree:
        path = tree / mutant.file
        path.write_text(path.read_text().replace(mutant.old, mutant.new))
        done = run_tests(tree, mutant.tests, timeout)
    if done.returncode is None:
        return Outcome(mutant, "timed out")
    if done.returncode < 0:
        return Outcome(mutant, "caught", f"the tests ended by signal {-done.returncode}")
    if done.returncode > 1:
        return Outcome(mutant, "out of date", done.output[-300:])
    failed = [line for line in done.output.splitlines() if line.startswith(("FAILED", "ERROR"))]
    return Outcome(mutant, "caught" if done.returncode else "survived", failed[0][:150] if failed else "")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", default="", help="mutants with this word in their file, texts or tests")
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--timeout", type=float, default=600, help="seconds that the tests of one mutant may take")
    parser.add_argument("--after", type=Path, help="output of an earlier run: what was caught there is not run again")
    parser.add_argument("--no-baseline", action="store_true", help="do not run the tests without a mutant first")
    options = parser.parse_args()
    chosen = [one for one in MUTANTS if options.only in " ".join(one)]
    os.environ["OMP_NUM_THREADS"] = "1"
    if not torch.cuda.is_available():
        os.environ["TRITON_INTERPRET"] = "1"  # before Triton is imported, as conftest.py has it
    FORKS.set_forkserver_preload(LIBRARIES)
    if not options.no_baseline:
        with copied_tree() as tree:
            for tests in sorted({one.tests for one in chosen if is_current(one)}):
                done = run_tests(tree, tests, options.timeout)
                if done.returncode:
                    print(f"without any mutant these tests fail: {tests}\n{done.output[-2000:]}")
                    return 2
    earlier = [] if options.after is None else options.after.read_text().splitlines()
    words: list[str] = []
    with ThreadPoolExecutor(options.jobs) as pool:
        for outcome in pool.map(tried, chosen, repeat(options.timeout), repeat(earlier)):
            words.append(outcome.word)
            print(f"{outcome.word:11} {described(outcome.mutant)}{outcome.detail}", flush=True)
    counts = {word: words.count(word) for word in WORDS}
    print(", ".join(f"{count} {word}" for word, count in counts.items()))
    return 2 if counts["out of date"] else 1 if counts["survived"] or counts["timed out"] else 0


if __name__ == "__main__":
    sys.exit(main())
