"""Take each guard out of the code, one at a time, and see its test fail; a row for each in results/mutations.csv.

    python tests/slow/mutations.py                       all of them; writes the rows
    python tests/slow/mutations.py "no float64 on MPS"   these alone; writes nothing

Works in a temporary copy of the checkout, where the tests must pass first. A mutation that its test does not notice
ends the script with an error.
"""

import argparse
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pandas as pd

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from conftest import ROOT, copy_checkout

from engine import files

DATA, FAST, FILES, RECORDS, CHECKPOINTS = (
    f"tests/engine/test_{name}.py" for name in ("data", "fast", "files", "records", "checkpoints")
)
TRAINER, FIGURES, UTILS = "tests/engine/test_trainer.py", "tests/engine/test_figures.py", "tests/test_utils.py"
PUBLISH, RUN, SWEEPS = (f"tests/experiments/test_{name}.py" for name in ("publish", "run", "sweeps"))
RESUMED = f"{TRAINER}::test_a_state_dict_holds_all_that_the_next_epochs_depend_on"
STOPPED = f"{TRAINER}::test_weights_stop_at_the_first_step_that_is_not_finite"
OTHER_DATA = f"{CHECKPOINTS}::test_a_checkpoint_of_other_data_is_refused_and_kept"
DAMAGE = f"{DATA}::test_damage_is_named_with_a_way_out"
SERVER = f"{DATA}::test_a_hostile_server_counts_as_absent_and_leaves_nothing"
OTHER_ROW = f"{PUBLISH}::test_a_row_of_another_kind_is_refused"

# guard, file, its text, the text that replaces it, the pytest node id of the test that must fail
MUTATIONS = [
    # checkpoints
    (
        "a checkpoint is written before the last epoch, too",
        "utils.py",
        "epoch == settings.epochs or time.perf_counter() - written >= CHECKPOINT_SECONDS",
        "epoch == settings.epochs",
        f"{UTILS}::test_an_interrupted_run_resumes_bit_for_bit",
    ),
    (
        "a checkpoint restores the optimizer's state",
        "engine/trainer.py",
        "                tensor.copy_(saved[name])\n",
        "                pass\n",
        RESUMED,
    ),
    (
        "a checkpoint restores the place in the schedule",
        "engine/trainer.py",
        '            self.global_step.copy_(state["global_step"])\n',
        "",
        RESUMED,
    ),
    (
        "a checkpoint restores which images are mirrored",
        "engine/trainer.py",
        '            self.flip.copy_(state["flip"])\n',
        "",
        RESUMED,
    ),
    (
        "a checkpoint restores the random generator",
        "engine/trainer.py",
        '        self.generator.set_state(state["generator"])\n',
        "",
        RESUMED,
    ),
    (
        "a checkpoint of other settings is refused",
        "engine/checkpoints.py",
        " if found.get(name) != fingerprint.get(name)]",
        " if False]",
        f"{CHECKPOINTS}::test_a_checkpoint_of_other_settings_is_refused",
    ),
    (
        "a checkpoint of other code is refused",
        "engine/checkpoints.py",
        "digest([*CODE.values()])",
        "digest([])",
        f"{CHECKPOINTS}::test_a_checkpoint_of_other_code_or_another_machine_is_refused",
    ),
    (
        "a checkpoint of other images is refused",
        "engine/checkpoints.py",
        '        "training images": data_hash(data.images),\n',
        "",
        OTHER_DATA,
    ),
    (
        "a checkpoint of other labels is refused",
        "engine/checkpoints.py",
        '        "training labels": data_hash(data.labels),\n',
        "",
        OTHER_DATA,
    ),
    (
        "an altered checkpoint is refused",
        "engine/checkpoints.py",
        "    if zipfile.ZipFile(io.BytesIO(content)).testzip():",
        "    if False:",
        f"{CHECKPOINTS}::test_a_changed_byte_in_any_tensor_is_refused",
    ),
    (
        "no code in a checkpoint runs",
        "engine/checkpoints.py",
        "weights_only=True",
        "weights_only=False",
        f"{CHECKPOINTS}::test_the_code_in_a_checkpoint_does_not_run",
    ),
    (
        "a net that computes more than its layers has no fused step",
        "engine/fast.py",
        "and then.__func__ is nn.Sequential.forward",
        "",
        f"{FAST}::test_a_forward_above_that_of_net_is_seen",
    ),
    (
        "a net of classes that can't be told takes no checkpoint",
        "engine/checkpoints.py",
        "        if not known or getattr(",
        "        if not known and getattr(",
        f"{CHECKPOINTS}::test_a_net_that_a_checkpoint_cannot_tell_takes_none",
    ),
    (
        "training code that was edited since it was loaded takes no checkpoint",
        "engine/checkpoints.py",
        "    check_loaded()\n",
        "",
        f"{CHECKPOINTS}::test_code_that_was_edited_since_it_was_loaded_takes_no_checkpoint",
    ),
    (
        "training code that imports other files takes no checkpoint",
        "engine/checkpoints.py",
        "    check_imports()\n",
        "",
        f"{CHECKPOINTS}::test_code_that_imports_other_files_takes_no_checkpoint",
    ),
    (
        "saved runs leave no checkpoint",
        "utils.py",
        "        checkpoints.remove_checkpoint(",
        "        print(",
        f"{UTILS}::test_runs_are_saved_and_leave_no_checkpoint",
    ),
    (
        "a failed call leaves the net's modes",
        "engine/checkpoints.py",
        "            module.training = mode\n",
        "            pass\n",
        f"{CHECKPOINTS}::test_a_failed_call_leaves_modes_and_gradients",
    ),
    # divergence
    (
        "weights stop at a gradient that is not finite",
        "engine/trainer.py",
        "        self.optimizer.found_inf = self.diverged\n",
        "        self.optimizer.found_inf = None\n",
        STOPPED,
    ),
    (
        "the step that diverged is kept",
        "engine/trainer.py",
        "            self.counts += 1 - self.diverged.long()",
        "            self.counts += 1",
        STOPPED,
    ),
    (
        "a run that diverges ends",
        "utils.py",
        "                trainer.check_finite()\n",
        "",
        f"{UTILS}::test_a_run_that_diverges_ends_where_it_does",
    ),
    (
        "a row of a sweep says that its run diverged",
        "experiments/run.py",
        "        diverged = bool(trainer.diverged)\n",
        "        diverged = False\n",
        f"{RUN}::test_a_run_that_diverged_is_noted_and_not_run_again",
    ),
    (
        "a setting that diverged once is not the best",
        "experiments/tuning.py",
        "values.mean(skipna=False)",
        "values.mean()",
        f"{SWEEPS}::test_a_setting_that_diverged_once_is_not_the_best",
    ),
    # files
    (
        "an older file stays until the new one is whole",
        "engine/files.py",
        "        write(temporary)\n",
        "        write(Path(path))\n        temporary.write_bytes(Path(path).read_bytes())\n",
        f"{FILES}::test_what_fails_leaves_the_old_file_and_nothing_else",
    ),
    (
        "processes do not overwrite each other's rows",
        "engine/files.py",
        "        with lock(target):\n",
        "        with contextlib.nullcontext():\n",
        f"{RECORDS}::test_no_row_of_several_writers_is_lost",
    ),
    (
        "a rerun replaces its row",
        "engine/records.py",
        "kept = [row for row in old if _key_of(row, key) not in replaced]",
        "kept = old",
        f"{RECORDS}::test_a_row_replaces_the_one_with_its_settings_and_no_other",
    ),
    (
        "an old row without a column is replaced",
        "engine/records.py",
        'row.get(name, "")) for name in key)',
        'row.get(name, "absent")) for name in key)',
        f"{RECORDS}::test_a_row_from_before_a_column_is_replaced",
    ),
    (
        "a folder that can't be written is refused at the start",
        "engine/files.py",
        '            _check_writable(Path(os.path.realpath(subfolder / "file")))\n',
        "            pass\n",
        f"{FILES}::test_a_folder_that_cannot_be_written_is_refused_at_once",
    ),
    (
        "a run does not write over published results",
        "engine/files.py",
        "        if in_git or is_checkout(folder) or folder in",
        "        if in_git or folder in",
        f"{FILES}::test_a_checkout_is_no_output_folder",
    ),
    # data
    (
        "files of CIFAR-10 are checked",
        "engine/download.py",
        "        check, listed = check_integrity,",
        "        check, listed = lambda path, md5: True,",
        DAMAGE,
    ),
    (
        "a file missing beside others is named",
        "engine/download.py",
        "raise (OSError if found else FileNotFoundError)(",
        "raise FileNotFoundError(",
        f"{DATA}::test_a_file_missing_beside_others_is_named",
    ),
    (
        "synthetic data does not replace a damaged file",
        "engine/data.py",
        "            if not isinstance(fault, FileNotFoundError):\n",
        "            if False:\n",
        DAMAGE,
    ),
    (
        "no code in a file of CIFAR-100 runs",
        "engine/download.py",
        'raise pickle.UnpicklingError(f"{module}.{name} is not part of an array")',
        "return super().find_class(module, name)",
        f"{DATA}::test_the_code_in_a_file_of_cifar100_does_not_run",
    ),
    (
        "a silent server counts as absent",
        "engine/download.py",
        "urlopen(url, timeout=TIMEOUT)",
        "urlopen(url)",
        f"{SERVER}[no answer]",
    ),
    (
        "a failed download leaves no file",
        "engine/download.py",
        "        part = Path(folder) / path.name\n",
        "        part = path\n",
        f"{SERVER}[a page]",
    ),
    (
        "validation images are not trained on",
        "engine/data.py",
        "        images=data.images[~held_out],\n        labels=data.labels[~held_out],\n",
        "",
        f"{DATA}::test_validation_split_takes_training_images_alone",
    ),
    (
        "validation runs do not touch the test set",
        "experiments/run.py",
        '    if split == "validation":\n',
        "    if False:\n",
        f"{RUN}::test_validation_runs_do_not_touch_the_test_set",
    ),
    (
        "every title names synthetic data",
        "engine/figures.py",
        '    return f"{text}\\n{data.name}" if data.synthetic else text\n',
        "    return text\n",
        f"{FIGURES}::test_synthetic_data_are_named_in_every_title",
    ),
    (
        "scoring is in strict float32",
        "utils.py",
        ", allow_tf32=False",
        "",
        f"{UTILS}::test_scoring_is_in_strict_float32_and_deterministic",
    ),
    # publishing
    (
        "a shorter run is not published",
        "experiments/publish.py",
        'if name != "seed"}',
        'if name not in ("seed", "epochs")}',
        OTHER_ROW,
    ),
    (
        "fewer than ten seeds are not published",
        "experiments/publish.py",
        "        if seeds != list(map(str, range(SEEDS))):\n",
        "        if False:\n",
        f"{PUBLISH}::test_nine_seeds_are_refused",
    ),
    (
        "synthetic data is not published",
        "experiments/publish.py",
        '"study": "main", ',
        "",
        OTHER_ROW,
    ),
    # input
    (
        "a misspelled sweep is refused",
        "experiments/run.py",
        "        if name not in SWEEPS:\n",
        "        if False:\n",
        f"{RUN}::test_what_can_not_be_run_ends_in_one_line",
    ),
    (
        "images of another form are refused",
        "engine/data.py",
        "    if images.dtype != torch.uint8 or len(shape) != 4 or shape[1:] != (32, 32, 3):\n",
        "    if False:\n",
        f"{DATA}::test_data_of_another_form_is_refused_in_one_line",
    ),
    (
        "labels out of range are refused",
        "engine/data.py",
        "    if low < 0 or high >= classes:\n",
        "    if False:\n",
        f"{DATA}::test_data_of_another_form_is_refused_in_one_line",
    ),
    (
        "groups that do not divide a width are refused",
        "models.py",
        'if norm == "group" and any(width % groups for width in normed):',
        "if False:",
        "tests/test_models.py::test_what_no_net_can_be_built_from_is_refused_by_name",
    ),
    (
        "nan and numbers out of range are refused",
        "utils.py",
        " or not 0 <= value <= high:",
        ":",
        f"{UTILS}::test_settings_out_of_range_are_refused_by_name",
    ),
    (
        "a seed that is there twice is not compared",
        "utils.py",
        '        if own["seed"].astype(str).duplicated().any():\n',
        "        if False:\n",
        f"{UTILS}::test_rows_that_cannot_be_compared_are_refused",
    ),
    (
        "a net with code of its own is trained as it is",
        "engine/fast.py",
        '        if not known and not vars(cls).get("state_in_buffers"):\n',
        "        if False:\n",
        f"{TRAINER}::test_a_net_with_code_of_its_own_trains_as_in_a_plain_loop",
    ),
    (
        "a net with hooks is trained as it is",
        "engine/fast.py",
        "        if has_own_code(module):\n",
        "        if False:\n",
        f"{TRAINER}::test_a_net_with_code_of_its_own_trains_as_in_a_plain_loop",
    ),
    (
        "a parameter without a gradient is named",
        "engine/trainer.py",
        "            if gradient is None:\n",
        "            if False:\n",
        f"{TRAINER}::test_a_parameter_without_a_gradient_is_refused_by_name",
    ),
    (
        "published weights take no options",
        "hubconf.py",
        "    if pretrained and options:\n",
        "    if False:\n",
        "tests/test_hub.py::test_options_with_the_weights_are_refused",
    ),
    # sweeps
    (
        "a sweep trains all of a run's epochs",
        "experiments/run.py",
        "            if trainer.diverged:\n                return\n",
        "            return\n",
        f"{RUN}::test_together_as_alone",
    ),
    (
        "a sweep ends a run that diverged",
        "experiments/run.py",
        "            if trainer.diverged:\n                return\n",
        "            pass\n",
        f"{RUN}::test_a_run_that_diverged_is_noted_and_not_run_again",
    ),
    (
        "a finished run whose row lacks a column is not run again",
        "experiments/sweeps.py",
        'columns=Experiment().columns(), fill_value=""',
        "columns=Experiment().columns()",
        f"{SWEEPS}::test_rows_from_before_a_column_count_as_finished",
    ),
    (
        "while a setting lacks seeds, none is the best",
        "experiments/tuning.py",
        "        if count < least:\n",
        "        if False:\n",
        f"{SWEEPS}::test_while_a_setting_lacks_seeds_none_is_the_best",
    ),
    # devices
    (
        "no float64 on MPS",
        "engine/trainer.py",
        "        self.metric_sums = torch.zeros(2, device=device)",
        "        self.metric_sums = torch.zeros(2, device=device, dtype=torch.float64)",
        f"{TRAINER}::test_training_uses_no_operator_that_mps_lacks",
    ),
    (
        "no CUDA call on a CPU",
        "engine/trainer.py",
        " if self.stream else contextlib.nullcontext",
        "",
        f"{TRAINER}::test_no_cuda_call_on_the_cpu_path",
    ),
    (
        "a net that the kernels do not know is not trained by them",
        "engine/trainer.py",
        "    return not reason\n",
        "    return True\n",
        f"{TRAINER}::test_the_fused_step_says_why_it_does_not_run",
    ),
    (
        "the kernels' Muon takes no other direction",
        "engine/trainer.py",
        " and self.optimizer.direction is newton_schulz",
        "",
        f"{TRAINER}::test_kernels_take_the_steps_of_newton_schulz_alone",
    ),
    (
        "a forged pickle of tuples in tuples is not loaded",
        "engine/download.py",
        "        if tuples > 1000 or (",
        "        if tuples > 10**9 or (",
        f"{DATA}::test_a_forged_pickle_neither_crashes_nor_fills_the_process",
    ),
    (
        "a checkpoint that might not hold all of a net is refused",
        "utils.py",
        "    if checkpoint is not None and (reason := fast.reason_against_copy(net)):\n",
        "    if False:\n",
        f"{CHECKPOINTS}::test_a_net_with_code_of_its_own_takes_no_checkpoint",
    ),
    # direct use of what the notebook uses
    (
        "a step trains the weights that the net has by then",
        "engine/trainer.py",
        "            if self.copied:\n",
        "            if self.copied and not self.global_step:\n",
        f"{TRAINER}::test_weights_that_change_between_steps_are_those_that_are_trained",
    ),
    (
        "a net that changes in more than its weights is refused",
        "engine/trainer.py",
        "        if self.held and self.held != fast.held(self.net):\n",
        "        if False:\n",
        f"{TRAINER}::test_a_net_that_changes_in_more_than_weights_is_refused_before_an_epoch",
    ),
    (
        "weights tied by their memory are refused",
        "engine/trainer.py",
        "        if not is_lazy(parameter) and first",
        "        if is_lazy(parameter) and first",
        f"{TRAINER}::test_weights_tied_by_their_memory_are_refused",
    ),
    (
        "a loss of the net beside its copy is refused",
        "engine/trainer.py",
        "            if master is not low and master.grad is not None:\n",
        "            if False:\n",
        f"{TRAINER}::test_a_loss_of_the_net_beside_its_copy_is_refused",
    ),
    (
        "a rate that is set in the optimizer is refused",
        "engine/trainer.py",
        "        if another or self.lr._version != self.lr_version:\n",
        "        if another:\n",
        f"{TRAINER}::test_a_rate_that_is_set_in_the_optimizer_is_refused_before_an_epoch",
    ),
    (
        "the layout of weights in memory changes nothing",
        "engine/trainer.py",
        "strides, tensor.shape, strict=True) if size > 1)",
        "tensor.stride(), tensor.shape, strict=True))",
        f"{TRAINER}::test_the_layout_of_weights_in_memory_changes_nothing",
    ),
    (
        "a norm frozen by eval is refused",
        "engine/trainer.py",
        "if module.training]:\n",
        "if False]:\n",
        f"{TRAINER}::test_a_norm_that_was_frozen_by_eval_is_refused",
    ),
    (
        "maps of a net that computes otherwise are refused",
        "engine/probe.py",
        "    if not same or (",
        "    if False and (",
        "tests/engine/test_probe.py::test_maps_of_a_net_that_computes_otherwise_are_refused",
    ),
    (
        "steps are those of an epoch",
        "engine/trainer.py",
        "        if self.steps_taken == self.steps_per_epoch:\n",
        "        if False:\n",
        f"{TRAINER}::test_steps_and_batches_are_those_of_an_epoch",
    ),
    (
        "means are those of the steps so far",
        "engine/trainer.py",
        "max(1, self.steps_taken)",
        "self.steps_per_epoch",
        f"{TRAINER}::test_means_are_those_of_the_steps_so_far",
    ),
    (
        "cells that differ in any field choose by their own runs",
        "experiments/tuning.py",
        'if field.name != "seed"]',
        'if field.name not in ("seed", "statistics_batch")]',
        "tests/experiments/test_tuning.py::test_cells_that_differ_in_any_field_choose_by_their_own_runs",
    ),
    (
        "runs of two settings are no sample",
        "experiments/tuning.py",
        "    for key in runs[runs.duplicated(",
        "    for key in runs.iloc[:0][runs.duplicated(",
        "tests/experiments/test_tables.py::test_no_table_pools_two_settings_of_a_net",
    ),
    (
        "no choice rests on rows of an earlier plan",
        "experiments/sweeps.py",
        "        rows = rows[~left_out]\n",
        "",
        f"{SWEEPS}::test_no_choice_rests_on_rows_of_an_earlier_plan",
    ),
    (
        "a run that an earlier plan had in another part of tuning counts once",
        "experiments/tuning.py",
        '    rows = rows[rows["study"].eq(rows.groupby([*KEYS, "seed"])["study"].transform("first"))]\n',
        "",
        f"{SWEEPS}::test_an_earlier_plan_of_tuning_changes_no_choice",
    ),
    (
        "seeds of an earlier edge do not steer the search for another",
        "experiments/tuning.py",
        " if one not in set(map(key, own))}",
        "}",
        f"{SWEEPS}::test_seeds_of_an_earlier_edge_do_not_steer_the_search_for_another",
    ),
    (
        "runs on another split do not count",
        "experiments/sweeps.py",
        ' & (rows["split"] == SWEEPS[sweep][0])',
        "",
        f"{SWEEPS}::test_runs_on_another_split_do_not_count",
    ),
    (
        "the order of rows changes no mean",
        "experiments/tuning.py",
        "means.round(9)",
        "means",
        "tests/experiments/test_tuning.py::test_the_order_of_rows_changes_no_mean",
    ),
    (
        "of two best settings, rows as texts and as numbers choose the same",
        "experiments/tuning.py",
        ".sort_index(key=as_numbers)",
        "",
        "tests/experiments/test_tuning.py::test_rows_as_texts_and_as_numbers_have_the_same_order",
    ),
    (
        "a variant named like a column of all rows is refused before training",
        "experiments/run.py",
        "        check_columns(one, columns)\n",
        "",
        f"{RUN}::test_a_variant_named_like_a_column_of_all_rows_is_refused_before_training",
    ),
    (
        "code that changed since it was loaded is not that of the commit",
        "engine/records.py",
        "changed or any(",
        "changed and any(",
        f"{RECORDS}::test_code_that_was_committed_after_it_was_loaded_is_not_that_of_the_commit",
    ),
    (
        "mistakes of other images are refused",
        "utils.py",
        "    records.check_tested(run, data)\n    scores, labels",
        "    scores, labels",
        f"{UTILS}::test_mistakes_of_other_images_are_refused",
    ),
    (
        "a batch beyond the GPU's memory is named",
        "utils.py",
        "        except torch.OutOfMemoryError:\n",
        "        except ZeroDivisionError:\n",
        f"{UTILS}::test_out_of_memory_names_a_smaller_batch",
    ),
]


def passes(folder, *tests):
    """Return whether the tests pass in `folder`; AssertionError when pytest can't run them."""
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", *tests]
    # A mutation can leave a file's size and its time in seconds, by which Python would take the old bytecode.
    environment = os.environ | {"PYTHONDONTWRITEBYTECODE": "1"}
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode in (0, 1), done.stdout[-3000:] + done.stderr[-3000:]
    assert "skipped" not in done.stdout.splitlines()[-1], done.stdout[-3000:]
    return done.returncode == 0


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("guards", nargs="*", metavar="GUARD", help="take these out alone")
    options = parser.parse_args(arguments)
    for name in options.guards:
        if name not in {guard for guard, *_ in MUTATIONS}:
            parser.error(f"guard is {name!r}; choose from {'; '.join(guard for guard, *_ in MUTATIONS)}")
    chosen = [mutation for mutation in MUTATIONS if mutation[0] in options.guards or not options.guards]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        copy_checkout(folder)
        if not passes(folder, *sorted({test for *_, test in chosen})):
            raise SystemExit("a test fails without a mutation")
        for guard, file, old, new, test in chosen:
            path = folder / file
            content = path.read_text(encoding="utf-8")
            if content.count(old) != 1:
                raise SystemExit(f"{guard}: {file} holds {old!r} {content.count(old)} times, not once")
            path.write_text(content.replace(old, new), encoding="utf-8")
            if passes(folder, test):
                raise SystemExit(f"{guard}: {test} passes without it")
            path.write_text(content, encoding="utf-8")
            print(f"{guard}: {test} fails without it", flush=True)
    if not options.guards:
        frame = pd.DataFrame([{"guard": guard, "test": test} for guard, *_, test in MUTATIONS])
        files.save(ROOT / "results" / "mutations.csv", lambda temporary: frame.to_csv(temporary, index=False))


if __name__ == "__main__":
    main()
