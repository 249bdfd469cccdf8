"""The commands of the trainer; in `export` and `recommend` serving has a part."""

from pipeline.contract.flags import Command

_OF_TRAINING = {
    "the method": "preset options frequency exclude_seen_negatives reduction teacher "
    "teacher_candidates teacher_graph",
    "the towers": "query_inputs candidate_inputs hidden feature_dim history history_pooling "
    "share_items id_dropout text_buckets num_layers popularity_power init_stddev init_from",
    "the optimizer": "batch_size optimizer learning_rate learning_rate_decay decay_epochs l2 "
    "batch_l2",
    "when it ends": "refit patience validation_metric checkpoint_minutes",
    "the machine": "jit_compile time_xla precision deterministic strategy devices",
}
_READ_BY_TRAINING = "frequency init_from refit teacher"
COMMANDS = {
    "train": Command(
        "towers.training.settings:TrainConfig",
        "towers.training.train:train",
        "train a two-tower model on prepared data",
        flags="data run method tower dim normalize temperature epochs",
        groups=_OF_TRAINING,
        stores=_READ_BY_TRAINING,
        reads="data",
        makes="run",
        presets="towers.presets:FLAGS",
    ),
    "tune": Command(
        "towers.tune.settings:TuneConfig",
        "towers.tune.study:tune",
        "search good settings of training on the validation split",
        flags="data output method tower trials epochs metric space",
        groups={"the search": "pruner startup_trials timeout overwrite", **_OF_TRAINING},
        stores=_READ_BY_TRAINING,
        reads="data",
        makes="output",
        presets="towers.presets:FLAGS",
    ),
    "evaluate": Command(
        "towers.evaluation.settings:EvaluateConfig",
        "towers.evaluation.evaluate:evaluate_run",
        "rank the whole corpus for every test user, and write a report",
        reads="data",
        changes="run",
    ),
    "compare": Command(
        "towers.evaluation.settings:CompareConfig",
        "towers.evaluation.compare:compare",
        "set evaluated runs side by side, with tests over the users",
        positional="runs",
        stores="runs output",
    ),
    "audit": Command(
        "towers.audit.settings:AuditConfig",
        "towers.audit.job:audit",
        "measure how far each sampler is from the full softmax on a trained run",
        flags="data run output methods k batches pairs max_seconds",
        reads="data",
        changes="run",
        makes="output",
    ),
    "methods": Command(
        "towers.catalogue:CatalogueConfig",
        "towers.catalogue:show_methods",
        "list the methods, or the options of one",
        positional="name",
    ),
    "towers": Command(
        "towers.catalogue:CatalogueConfig",
        "towers.catalogue:show_towers",
        "list the towers, or the flags of one",
        positional="name",
    ),
    "doctor": Command(
        "towers.doctor:DoctorConfig", "towers.doctor:report", "look at this machine's set-up"
    ),
}
