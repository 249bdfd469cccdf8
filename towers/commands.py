"""The commands of the trainer; in `export` and `recommend` serving has a part."""

from pipeline.contract.flags import Command

COMMANDS = {
    "train": Command(
        "towers.training.settings:TrainConfig",
        "towers.training.train:train",
        "train a two-tower model on them",
    ),
    "tune": Command(
        "towers.tune.settings:TuneConfig",
        "towers.tune.study:tune",
        "search good settings of training on the validation split",
    ),
    "evaluate": Command(
        "towers.evaluation.settings:EvaluateConfig",
        "towers.evaluation.evaluate:evaluate",
        "rank the whole corpus for every test user, and write a report",
    ),
    "compare": Command(
        "towers.evaluation.settings:CompareConfig",
        "towers.evaluation.compare:compare",
        "set evaluated runs side by side, with tests over the users",
    ),
    "audit": Command(
        "towers.audit.settings:AuditConfig",
        "towers.audit.job:audit",
        "measure how far each sampler is from the full softmax on a trained run",
    ),
    "doctor": Command(
        "towers.doctor:DoctorConfig", "towers.doctor:report", "look at this machine's set-up"
    ),
}
