"""Take each protection out of the code, one at a time, and see its test fail; a row for each in results/takeouts.csv.

    python tests/takeouts.py

Works in a clone of the committed files, where all the tests must pass first. A test that passes without what it guards
ends the script with an error, and nothing is written.
"""

import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pandas as pd

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

import utils  # noqa: E402

# protection, file, what stands there, what is put in its place, the test that should fail
TAKEOUTS = [
    # interrupted runs
    (
        "a checkpoint after each epoch",
        "utils.py",
        "            if checkpoint:\n",
        "            if checkpoint and epoch == settings.epochs:\n",
        "test_checkpoint.py::test_goes_on_bit_for_bit",
    ),
    (
        "a checkpoint holds the momenta",
        "utils.py",
        '            self.optimizer.momenta.copy_(state["momenta"])\n',
        "",
        "test_checkpoint.py::test_goes_on_bit_for_bit",
    ),
    (
        "a checkpoint holds the place in the schedule",
        "utils.py",
        '            self.now.copy_(state["now"])\n',
        "",
        "test_checkpoint.py::test_goes_on_bit_for_bit",
    ),
    (
        "a checkpoint holds which images are mirrored",
        "utils.py",
        '            self.flip.copy_(state["mirrored images"])\n',
        "",
        "test_checkpoint.py::test_goes_on_bit_for_bit",
    ),
    (
        "a checkpoint holds the random generator",
        "utils.py",
        '        self.generator.set_state(state["generator"])\n',
        "",
        "test_checkpoint.py::test_goes_on_bit_for_bit",
    ),
    (
        "weights and their working copy are both restored",
        "utils.py",
        "                working.copy_(parameter)\n",
        "                pass\n",
        "test_checkpoint.py::test_goes_on_bit_for_bit",
    ),
    (
        "a checkpoint of other settings is refused",
        "utils.py",
        "        if of.get(name) != wanted.get(name):\n",
        "        if False:\n",
        "test_checkpoint.py::test_a_checkpoint_of_another_run_is_refused_and_kept",
    ),
    (
        "a checkpoint of other code is refused",
        "utils.py",
        '        "code": hashlib.sha1(code).hexdigest()[:10],\n',
        "",
        "test_checkpoint.py::test_a_checkpoint_of_other_code_or_torch_is_refused",
    ),
    (
        "a checkpoint of other pixels is refused",
        "utils.py",
        '        "sum of the pixels": data.images.flatten().view(torch.int64).sum().item(),\n',
        "",
        "test_checkpoint.py::test_a_checkpoint_of_another_run_is_refused_and_kept",
    ),
    (
        "a file of CIFAR-10 that is missing beside others is named",
        "utils.py",
        "        partly = 0 < len(absent) < len(files)\n",
        "        partly = False\n",
        "test_files.py::test_a_file_is_missing_beside_others",
    ),
    (
        "a checkpoint of other labels is refused",
        "utils.py",
        '        "sum of the labels, each times its place": (data.labels * places).sum().item(),\n',
        "",
        "test_checkpoint.py::test_a_checkpoint_of_another_run_is_refused_and_kept",
    ),
    (
        "an altered checkpoint is noticed",
        "utils.py",
        "            if file.testzip():",
        "            if False:",
        "test_checkpoint.py::test_a_damaged_checkpoint_is_refused_and_kept",
    ),
    (
        "no code is run out of a checkpoint",
        "utils.py",
        'saved = torch.load(path, map_location="cpu", weights_only=True)',
        'saved = torch.load(path, map_location="cpu", weights_only=False)',
        "test_checkpoint.py::test_no_code_is_run_out_of_a_checkpoint",
    ),
    (
        "a saved experiment leaves no checkpoint",
        "utils.py",
        "        (plan.checkpoints / f\"{name}-{one.row['seed']}.pt\").unlink(missing_ok=True)\n",
        "        pass\n",
        "test_checkpoint.py::test_an_experiment_that_is_saved_leaves_no_checkpoint",
    ),
    # divergence
    (
        "weights stop where gradients are not finite",
        "utils.py",
        "        self.optimizer.found_inf = self.diverged\n",
        "        self.optimizer.found_inf = None\n",
        "test_checkpoint.py::test_weights_stop_at_the_first_step_that_is_not_finite",
    ),
    (
        "the first bad step is kept",
        "utils.py",
        "            self.now += 1 - self.diverged.long()",
        "            self.now += 1",
        "test_checkpoint.py::test_weights_stop_at_the_first_step_that_is_not_finite",
    ),
    (
        "a run that diverges ends",
        "utils.py",
        "            trainer.check_finite()\n",
        "",
        "test_checkpoint.py::test_train_says_where_it_diverged",
    ),
    (
        "a sweep's row says that it diverged",
        "study.py",
        "            diverged=bool(trainer.diverged),\n",
        "",
        "test_checkpoint.py::test_sweeps_note_what_diverged_and_go_on",
    ),
    (
        "a setting that diverged once is not the best",
        "report.py",
        "values.mean(skipna=False)",
        "values.mean()",
        "test_report.py::test_a_setting_that_diverged_once_is_not_the_best",
    ),
    # files
    (
        "files are moved into place when they are whole",
        "utils.py",
        "        write(temporary)\n        os.replace(temporary, path)\n",
        "        write(path)\n",
        "test_files.py::test_a_full_disk_leaves_the_old_file",
    ),
    (
        "processes do not overwrite each other's rows",
        "utils.py",
        '    with FileLock(path.with_name(f".{path.name}.lock")):',
        "    with contextlib.nullcontext():",
        "test_scoring.py::test_no_row_is_lost_between_processes",
    ),
    (
        "a rerun replaces its row",
        "utils.py",
        "new = pd.concat([old[kept], new])",
        "new = pd.concat([old, new])",
        "test_scoring.py::test_rows_are_replaced_by_their_settings",
    ),
    (
        "a folder that can't be written is refused at the start",
        "utils.py",
        "            with tempfile.TemporaryFile(dir=plan.folder(name)):\n                pass\n",
        "            plan.folder(name)\n",
        "test_training.py::test_a_folder_that_is_there_but_cannot_be_written",
    ),
    (
        "a user's run writes to S8_OUT alone",
        "utils.py",
        'Path(os.environ.get("S8_OUT") or "out")',
        'Path("out")',
        "test_training.py::test_environment",
    ),
    # data
    (
        "CIFAR-10's files are checked",
        "utils.py",
        "    if not all(check_integrity(path, md5) for path, md5 in files.items()):\n",
        "    if not all(path.exists() for path, md5 in files.items()):\n",
        "test_files.py::test_damage_is_named_with_a_way_out",
    ),
    (
        "a damaged file is not passed over for the stand-in",
        "utils.py",
        "            if damaged:\n",
        "            if False:\n",
        "test_files.py::test_damage_is_named_with_a_way_out",
    ),
    (
        "a silent network counts as absent",
        "utils.py",
        "        asking.join(seconds)\n",
        "        asking.join()\n",
        "test_data.py::test_silent_network",
    ),
    (
        "half an archive is not left behind",
        "utils.py",
        "            archive.unlink(missing_ok=True)\n",
        "            pass\n",
        "test_files.py::test_a_page_instead_of_the_archive",
    ),
    (
        "validation images are not trained on",
        "utils.py",
        "    kept[held_out] = False\n",
        "",
        "test_data.py::test_validation_split",
    ),
    (
        "validation runs don't see the test set",
        "study.py",
        '    if STUDIES[study][0] == "validation":\n',
        "    if False:\n",
        "test_study.py::test_validation_runs_do_not_touch_the_test_set",
    ),
    (
        "the stand-in is named in every title",
        "utils.py",
        '    return text if data.real else f"{text}\\n{data.name}"\n',
        "    return text\n",
        "test_scoring.py::test_stand_in_is_named_in_every_title",
    ),
    (
        "scores are in strict float32",
        "utils.py",
        ", allow_tf32=False",
        "",
        "test_scoring.py::test_scoring_is_in_strict_float32",
    ),
    # publishing
    (
        "a shortened run is not published",
        "utils.py",
        "        if epochs < Settings.epochs:\n",
        "        if False:\n",
        "test_training.py::test_wrong_environment",
    ),
    (
        "fewer than ten seeds are not published",
        "utils.py",
        "        if len(plan.seeds) < 10:\n",
        "        if False:\n",
        "test_training.py::test_wrong_environment",
    ),
    (
        "the stand-in is not published",
        "utils.py",
        '        if plan.data == "synthetic":\n',
        "        if False:\n",
        "test_training.py::test_wrong_environment",
    ),
    (
        "a misspelt setting is not passed over",
        "utils.py",
        '        if name.startswith("S8_") and name not in known:\n',
        "        if False:\n",
        "test_training.py::test_wrong_environment",
    ),
    # input
    (
        "images of another form are refused",
        "utils.py",
        "    if images.dtype != torch.uint8 or len(shape) != 4 or shape[1:] != (32, 32, 3):\n",
        "    if False:\n",
        "test_bad_input.py",
    ),
    (
        "labels out of range are refused",
        "utils.py",
        "    if low < 0 or high > 9:\n",
        "    if False:\n",
        "test_bad_input.py",
    ),
    (
        "groups that do not divide a width are refused",
        "models.py",
        "        if any(width % groups for width in normed):\n",
        "        if False:\n",
        "test_bad_input.py",
    ),
    (
        "nan and numbers out of range are refused",
        "utils.py",
        "isinstance(value, bool) or not low <= value <= high:",
        "isinstance(value, bool):",
        "test_bad_input.py",
    ),
    (
        "a seed that is there twice is not paired",
        "utils.py",
        "    if first.index.has_duplicates or second.index.has_duplicates:\n",
        "    if False:\n",
        "test_bad_input.py",
    ),
    (
        "published weights take no options",
        "hubconf.py",
        "    if pretrained and options:\n",
        "    if False:\n",
        "test_reuse.py::test_hub_refuses_options_with_the_weights",
    ),
    # sweeps
    (
        "a sweep trains all of its epochs",
        "study.py",
        "            if trainer.diverged:\n                return\n",
        "            return\n",
        "test_study.py::test_together_as_alone",
    ),
    (
        "a sweep's run that diverged ends there",
        "study.py",
        "            if trainer.diverged:\n                return\n",
        "            pass\n",
        "test_checkpoint.py::test_sweeps_note_what_diverged_and_go_on",
    ),
    (
        "rows from before a column are replaced",
        "utils.py",
        'columns=key, fill_value=""',
        "columns=key",
        "test_scoring.py::test_rows_are_replaced_by_their_settings",
    ),
    (
        "rows from before a column are not run again",
        "study.py",
        'columns=names, fill_value=""',
        "columns=names",
        "test_study.py::test_runs_what_is_missing_and_no_more",
    ),
    (
        "a setting counts with all three seeds alone",
        "report.py",
        "lambda own: len(own) == 3",
        "lambda own: len(own) > 0",
        "test_report.py::test_a_decay_that_is_better_now_counts_when_its_seeds_are_there",
    ),
    # machines
    (
        "no float64, which MPS lacks",
        "utils.py",
        "self.sums = torch.zeros(2, device=device)",
        "self.sums = torch.zeros(2, device=device, dtype=torch.float64)",
        "test_training.py::test_training_uses_no_operator_that_mps_lacks",
    ),
    (
        "no CUDA call on the CPU path",
        "utils.py",
        "if self.stream else contextlib.nullcontext",
        "",
        "test_training.py::test_no_cuda_call_on_the_cpu_path",
    ),
    (
        "without a compiler training goes on",
        "utils.py",
        "        if compile and can_compile(device):\n",
        "        if compile:\n",
        "test_training.py::test_without_a_compiler_training_goes_on",
    ),
    (
        "a batch beyond the GPU's memory is named",
        "utils.py",
        "    except torch.OutOfMemoryError:\n",
        "    except ZeroDivisionError:\n",
        "test_training.py::test_out_of_memory",
    ),
]


def passes(folder, *tests):
    """Whether the tests pass in the clone `folder`, with no setting of the notebook's around."""
    command = [sys.executable, "-m", "pytest", "-q", "-x", *(f"tests/{test}" for test in tests)]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("S8_")}
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode in (0, 1), done.stdout[-3000:]  # others: pytest found no tests, or could not read them
    return done.returncode == 0


def main():
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name) / "clone"
        subprocess.run(["git", "clone", "-q", str(ROOT), str(folder)], check=True)
        assert passes(folder, *sorted({test for *_, test in TAKEOUTS})), "a test fails with nothing taken out"
        rows = []
        for what, file, old, new, test in TAKEOUTS:
            path = folder / file
            whole = path.read_text(encoding="utf-8")
            assert whole.count(old) == 1, f"{file} holds {old!r} {whole.count(old)} times"
            path.write_text(whole.replace(old, new), encoding="utf-8")
            if passes(folder, test):
                raise SystemExit(f"{test} passes without this: {what}")
            path.write_text(whole, encoding="utf-8")
            rows.append({"protection": what, "test": test})
            print(what, flush=True)
    frame = pd.DataFrame(rows)
    utils.save(ROOT / "results" / "takeouts.csv", lambda temporary: frame.to_csv(temporary, index=False))


if __name__ == "__main__":
    main()
