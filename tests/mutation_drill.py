"""Would the tests notice? Break one central line at a time in a copy of the package, and see that a test fails each time.

    python tests/mutation_drill.py                     # all of them, some minutes
    python tests/mutation_drill.py --only "sign of λ"  # those whose name holds these letters
    python tests/mutation_drill.py --store             # keep the result in tests/mutation_drill.json; with --only, of those
"""
import argparse
import importlib
import json
import multiprocessing
import os
import platform
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import namedtuple
from datetime import datetime, timezone
from importlib.metadata import version
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
os.environ |= dict(OMP_NUM_THREADS="1", MKL_NUM_THREADS="1", PYTHONDONTWRITEBYTECODE="1")   # compiled, an edited module could pass for the old one
sys.dont_write_bytecode = True
RESULT = ROOT / "tests" / "mutation_drill.json"
PATIENCE = 600   # seconds for one run of tests
Mutation = namedtuple("Mutation", "name module tests old new")   # tests: a file in tests/, or one test of it

MUTATIONS = [Mutation(*row) for row in (
    # losses
    ("sign of λ in MMELoss", "losses", "test_losses.py",
     "logits + self.lambdas[:, None, None] * log_prior",
     "logits - self.lambdas[:, None, None] * log_prior"),
    ("prior not normalised in log_prior", "losses", "test_losses.py",
     "F.log_softmax(torch.as_tensor(cls_num_list).float().log(), dim=0)",
     "torch.as_tensor(cls_num_list).float().log()"),
    ("sign of τ in logit adjustment", "losses", "test_losses.py",
     "logits + self.tau * log_prior",
     "logits - self.tau * log_prior"),
    ("experts answer by their mean logits", "losses", "test_losses.py",
     "return probs.mean(0) if probs.dim() == 3 else probs",
     "return logits.mean(0).softmax(-1) if probs.dim() == 3 else probs"),
    ("focal weight dropped", "rebalancing", "test_rebalancing.py",
     "-(t * missing**self.gamma * log_p).sum()",
     "-(t * log_p).sum()"),
    ("LDAM margin sign", "rebalancing", "test_rebalancing.py",
     "z - self.s * t * self.margins",
     "z + self.s * t * self.margins"),
    ("LDAM margin for common classes", "rebalancing", "test_rebalancing.py",
     "(counts.min() / counts)**0.25",
     "(counts / counts.max())**0.25"),
    ("LDAM re-weighted from the start", "rebalancing", "test_rebalancing.py",
     "weights = self.weights if self.progress >= self.defer else",
     "weights = self.weights if self.progress >= 0 else"),
    ("class-balanced weights not normalised", "rebalancing", "test_rebalancing.py",
     "return (rarity / rarity.mean()).float()",
     "return rarity.float()"),
    ("RIDE pulls experts together", "ensembles", "test_ensembles.py",
     "loss + self.diversity * expert_diversity",
     "loss - self.diversity * expert_diversity"),
    ("RIDE lets gradient through the mean", "ensembles", "test_ensembles.py",
     "z.detach().mean(0) / temperature",
     "z.mean(0) / temperature"),
    ("SADE's inverse prior not reversed", "ensembles", "test_ensembles.py",
     "log_prior(reversed_counts(cls_num_list))",
     "log_prior(_check_counts(cls_num_list))"),
    ("test-time weights make views differ", "ensembles", "test_ensembles.py",
     "(-F.cosine_similarity(p, q, dim=-1).mean()).backward()",
     "F.cosine_similarity(p, q, dim=-1).mean().backward()"),
    # adapters, classifiers, prompts, caches
    ("A and B swapped in LoRAExperts", "experts", "test_experts.py",
     "self.lora_A.mT)\n        return torch.baddbmm(F.linear(rows, weight, bias), low, self.lora_B.mT,",
     "self.lora_B)\n        return torch.baddbmm(F.linear(rows, weight, bias), low, self.lora_A,"),
    ("update not scaled in LoRAExperts", "experts", "test_experts.py",
     "self.scaling, self.dropout = lora_alpha / r,",
     "self.scaling, self.dropout = lora_alpha,"),
    ("all experts begin with one A", "experts", "test_experts.py",
     "A = torch.stack([init_lora_A(r, weight.shape[1], generator) for _ in range(num_experts)])",
     "A = init_lora_A(r, weight.shape[1], generator).repeat(num_experts, 1, 1)"),
    ("text LoRA off by its scaling", "prompts", "test_prompts.py",
     "LoRAExperts(weight, 1, r, lora_alpha, lora_dropout, generator)",
     "LoRAExperts(weight, 1, r, lora_alpha * r, lora_dropout, generator)"),
    ("CoOp context not trained", "prompts", "test_prompts.py",
     "self.context.expand(len(self.tokens), -1, -1)",
     "self.context.detach().expand(len(self.tokens), -1, -1)"),
    ("prompts see later tokens", "prompts", "test_prompts.py",
     "None if mask is None else mask[:L, :L]",
     "None"),
    ("AdaptFormer not the identity at its start", "adaptformer", "test_adaptformer.py",
     "(self.down_proj.bias, self.up_proj.weight, self.up_proj.bias)",
     "(self.down_proj.bias, self.up_proj.bias)"),
    ("Tip-Adapter counts what is far", "tip_adapter", "test_tip_adapter.py",
     "return (-beta * (1 - features @ keys.T)).exp() @ values",
     "return (beta * (1 - features @ keys.T)).exp() @ values"),
    ("τ-norm multiplies", "classifiers", "test_classifiers.py",
     "weight / norms.where",
     "weight * norms.where"),
    ("post-hoc bias sign", "classifiers", "test_classifiers.py",
     "(-tau * (counts / counts.sum()).log())",
     "(tau * (counts / counts.sum()).log())"),
    ("cosine head grows with its weight", "classifiers", "test_classifiers.py",
     "self.scale * F.normalize(self.weight, dim=-1)",
     "self.scale * self.weight"),
    # what is shown
    ("mask inverted in mix_patches", "mixing", "test_mixing.py",
     "torch.where(keep, images[:len(partner)]",
     "torch.where(~keep, images[:len(partner)]"),
    ("MixSSS partner on the diagonal", "mixing", "test_mixing.py",
     "similarity.clone().fill_diagonal_(diagonal)",
     "similarity.clone()"),
    ("CutMix label not the pixel share", "mixing", "test_mixing.py",
     "kept = kept_share(mask, *images.shape[-2:])",
     "kept = torch.full((len(partner),), lam)"),
    ("remix leans to the common class", "mixing", "test_mixing.py",
     "if lam < tau: share[own >= kappa * partner] = 0.",
     "if lam < tau: share[partner >= kappa * own] = 0."),
    ("CMO pastes the common on the rare", "training", "test_methods.py::test_cmo_backgrounds_come_as_images_come_and_foregrounds_as_classes",
     "np.concatenate([drawn.reshape(-1, size), front.reshape(-1, size)], 1)",
     "np.concatenate([front.reshape(-1, size), drawn.reshape(-1, size)], 1)"),
    ("CMO foregrounds as images come", "mixing", "test_mixing.py",
     'foreground = "class"',
     'foreground = "instance"'),
    ("class-aware sampler draws by images", "sampling", "test_sampling.py::test_the_published_sampler_and_ours_draw_from_one_distribution",
     "sampling_prior(self.name, self.cls_num_list)",
     'sampling_prior("instance", self.cls_num_list)'),
    ("split with val in train", "longtail", "test_longtail.py",
     "parts[part].append(chunk)",
     'parts[part].append(idx[n_test:] if part == "train" else chunk)'),
    ("few-shot group at the wrong end", "longtail", "test_longtail.py",
     'np.where(n > many, "many", np.where(n < few, "few", "medium"))',
     'np.where(n > many, "few", np.where(n < few, "many", "medium"))'),
    # training and judging
    ("Holm's order turned round", "contrasts", "test_contrasts.py",
     'order = np.argsort(p, kind="stable")',
     'order = np.argsort(-p, kind="stable")'),
    ("Holm's factors turned round", "contrasts", "test_contrasts.py",
     "p[order] * np.arange(len(p), 0, -1)",
     "p[order] * np.arange(1, len(p) + 1)"),
    ("evaluation with the train transform", "training", "test_methods.py::test_a_recipe_trains_is_judged_kept_and_answers_again[ce]",
     "eval_batches(task.cache, indices, batch_size, eval_transform(task.clip.preprocess))",
     'eval_batches(task.cache, indices, batch_size, train_transform("aerial", task.clip.preprocess))'),
    ("frozen encoder left in the optimiser's hands", "training", "test_methods.py::test_a_recipe_trains_is_judged_kept_and_answers_again[ce]",
     "params = list(trainable(model).values())",
     "params = list(model.requires_grad_(True).parameters())"),
    ("a resumed run forgets its optimiser", "training", "test_methods.py::test_a_stopped_run_goes_on_to_the_same_numbers[clip-lora]",
     '    learner.optimizer.load_state_dict(state["optimizer"])\n',
     ""),
    ("mixing draws once for the whole run", "training", "test_methods.py::test_every_step_mixes_by_a_draw_of_its_own_that_its_seed_repeats",
     "self.mix.generator.manual_seed(step_seed(seed, t, 0))",
     "self.mix.generator.manual_seed(step_seed(seed, 0, 0))"),
    ("numbers are chosen on test", "training", "test_methods.py::test_what_a_recipe_chooses_by_itself_is_chosen_on_validation[tip-adapter]",
     'return "val" if len(task.split.val) else "train"',
     'return "test"'),
    ("calibration error without its sign taken off", "metrics", "test_metrics.py",
     "np.abs(np.bincount(place, weights=right - confidence, minlength=bins)).sum()",
     "np.bincount(place, weights=right - confidence, minlength=bins).sum()"),
    ("recall by answers, not by truth", "metrics", "test_metrics.py",
     "return _ratio(np.diag(confusion), confusion.sum(1))",
     "return _ratio(np.diag(confusion), confusion.sum(0))"),
)]


def source(root, module): return root / "dmrs_nb" / f"{module}.py"


def places(mutation, root=ROOT) -> int:
    "How often the text to replace occurs in its module; anything but once makes the mutation meaningless."
    return source(root, mutation.module).read_text(encoding="utf-8").count(mutation.old)


class Watch:
    "A pytest plugin: what ran, and what failed."
    def __init__(self): self.passed, self.failed, self.broken = 0, [], []
    def pytest_runtest_logreport(self, report):
        if report.failed: (self.failed if report.when == "call" else self.broken).append(report.nodeid.removeprefix("tests/"))
        self.passed += report.passed and report.when == "call"
    def pytest_collectreport(self, report):
        if report.failed: self.broken.append(f"collecting {report.nodeid}")


def run_tests(copy: Path, tests: str) -> tuple:  # (failed tests by name, how it went)
    "Run tests on a copy in this process, which is there for nothing else, until one test fails; errors outside of tests do not count as failures."
    import pytest
    os.environ |= dict(PYTHONPATH=str(copy), DMRS_NB_CACHE=str(copy / "cache"))   # the first for processes that tests start
    sys.path.insert(0, str(copy)); os.chdir(copy)
    watch = Watch()
    with open(copy / "output.txt", "w") as out:
        for stream in (1, 2): os.dup2(out.fileno(), stream)
        pytest.main(["-x", "-q", "-p", "no:cacheprovider", f"tests/{tests}"], plugins=[watch])
    import dmrs_nb
    if not Path(dmrs_nb.__file__).resolve().is_relative_to(copy.resolve()): return [], "another dmrs_nb than the copy was imported"
    return watch.failed, f"{watch.passed} passed, {len(watch.failed)} failed" + (f", broken: {watch.broken[0]}" if watch.broken else "")


def drill(task) -> dict:
    "In a copy of package and tests break one line, or none, and run its tests."
    (name, module, tests, old, new), clock = task, time.perf_counter()
    if hasattr(signal, "alarm"): signal.alarm(PATIENCE)
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        for part in ("dmrs_nb", "tests"): shutil.copytree(ROOT / part, Path(folder) / part, ignore=shutil.ignore_patterns("__pycache__", ".*"))
        if module:
            path = source(Path(folder), module)
            path.write_text(path.read_text(encoding="utf-8").replace(old, new), encoding="utf-8")
        failed, how = run_tests(Path(folder), tests)
        os.chdir(ROOT)
    return dict(name=name, module=module, tests=tests, killed_by=failed[0] if failed else None, seconds=round(time.perf_counter() - clock, 1), how=how)


def warm() -> None:
    "Import what is slow and is never broken, and forget the package itself."
    sys.path.insert(0, str(ROOT))
    import dmrs_nb.compat   # before torchvision
    for name in "open_clip torchmetrics pandas scipy.stats sklearn accelerate peft hypothesis pydantic pytest".split(): importlib.import_module(name)
    sys.path.remove(str(ROOT))
    for name in [n for n in sys.modules if n.partition(".")[0] == "dmrs_nb"]: del sys.modules[name]


def each_in_its_own_process(tasks, jobs: int) -> list:
    "Results of `drill`, printed as they come. Processes begin with the slow libraries imported, where the system can fork."
    method = "fork" if "fork" in multiprocessing.get_all_start_methods() and sys.platform != "darwin" else "spawn"
    if method == "fork": warm()
    rows = []
    with multiprocessing.get_context(method).Pool(jobs, maxtasksperchild=1) as pool:
        for row in pool.imap(drill, tasks, chunksize=1): rows.append(row); print(line(row), flush=True)
    return rows


def line(row) -> str:
    end = row["module"] and row["killed_by"] or row["how"]
    end = f"SURVIVED: {end}" if row["module"] and not row["killed_by"] else end
    return f"{row['name']:<46} {row['module'] or '':<12} {row['tests'].partition('::')[0]:<22} {row['seconds']:>6.1f} s  {end}"


def git(*args) -> str: return subprocess.run(["git", "-C", str(ROOT), *args], capture_output=True, text=True).stdout.strip()


def store(rows) -> None:
    "Put rows into the stored result, each with its date and commit, in the order of MUTATIONS; rows of mutations that are no more go."
    changes = git("status", "--porcelain", "--", "dmrs_nb", "tests", ":(exclude)dmrs_nb/_modidx.py", f":(exclude)tests/{RESULT.name}")
    when = dict(date=datetime.now(timezone.utc).isoformat(timespec="seconds"), commit=git("rev-parse", "HEAD") + ("+changes" if changes else ""))
    packages = {p: version(p) for p in ("torch", "torchvision", "open_clip_torch", "numpy", "pytest", "hypothesis")}
    before = json.loads(RESULT.read_text(encoding="utf-8"))["mutations"] if RESULT.exists() else []
    kept = {r["name"]: r for r in before} | {r["name"]: {k: v for k, v in r.items() if k != "how"} | when for r in rows}
    text = json.dumps(when | dict(python=platform.python_version(), packages=packages, mutations=[kept[m.name] for m in MUTATIONS if m.name in kept]),
                      indent=1, ensure_ascii=False)
    part = RESULT.with_name(RESULT.name + ".part")
    part.write_text(text + "\n", encoding="utf-8")
    os.replace(part, RESULT)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", default="", help="run the mutations whose name holds this")
    parser.add_argument("--jobs", type=int, default=1, help="how many at a time")
    parser.add_argument("--store", action="store_true", help=f"put the result into {RESULT.name}")
    args = parser.parse_args()
    chosen = [m for m in MUTATIONS if args.only in m.name]
    if not chosen: parser.error(f"--only: no mutation's name holds {args.only!r}; there are {'; '.join(m.name for m in MUTATIONS)}")
    if lost := [f"{m.name}: the text to replace is found {places(m)} times in {m.module}.py, expected once" for m in chosen if places(m) != 1]:
        sys.exit("\n".join(lost))
    unbroken = each_in_its_own_process([Mutation("nothing broken", None, t, "", "") for t in dict.fromkeys(m.tests for m in chosen)], args.jobs)
    if bad := [r["tests"] for r in unbroken if r["killed_by"] or "broken" in r["how"] or r["how"].startswith("0 ")]:
        sys.exit(f"before anything is broken, tests fail in {', '.join(bad)}")
    rows = each_in_its_own_process(chosen, args.jobs)
    survived = [r["name"] for r in rows if not r["killed_by"]]
    print(f"{len(rows) - len(survived)} of {len(rows)} killed" + (f"; survived: {', '.join(survived)}" if survived else ""))
    if args.store: store(rows)
    return bool(survived)


if __name__ == "__main__": sys.exit(main())
