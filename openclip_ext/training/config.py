"""What a run is to do: what comes of a command line, once, and is not changed afterwards. Imports no torch."""

import dataclasses
from collections.abc import Collection, Mapping, Sequence
from typing import Any, Literal

from openclip_ext import upstream
from openclip_ext.options import parse_assignments, parse_terms
from openclip_ext.training.lora import LoRAOptions, parse_lora


@dataclasses.dataclass(frozen=True, kw_only=True)
class RunConfig:
    """What this package reads of a command line, under the names of its flags, and all of it for OpenCLIP's functions.

    Fields without a default are OpenCLIP's flags, with its meanings; flags that only its own functions read have no
    field. Fields with one are added here.

    Attributes:
        flags: every flag, OpenCLIP's and ours: what functions of `upstream` take and what a run's record says.
        given: names of those that the command line has.
        loss_options: of `--loss-arg`, as text; a loss knows their types.
        loss_terms: of `--loss-term`, by name: the weight, and options as text.
        lora: of `--lora`; None: train the weights themselves.
    """

    flags: upstream.Flags
    given: Collection[str] = ()

    # model
    model: str
    precision: str
    seed: int
    distill_model: str | None
    distill_pretrained: str | None
    coca_caption_loss_weight: float
    coca_contrastive_loss_weight: float
    use_bn_sync: bool
    torchcompile: bool
    model_config: str | None = None
    ema: float | None = None
    lora: LoRAOptions | None = None

    # objective
    loss: str = "clip"
    loss_options: Mapping[str, str] = dataclasses.field(default_factory=dict)
    loss_terms: Mapping[str, Mapping[str, str]] = dataclasses.field(default_factory=dict)
    pairs: str = "captions"
    momentum_encoder: float | None = None
    fusion: str | None = None
    task: str | None = None
    task_images: str | None = None
    answers: str | None = None
    warm_start_pass: bool = False
    recent_batches: int | None = None
    recent_check: int | None = None
    recent_limit: float | None = None
    loss_tile: int | None = None
    loss_comm: Literal["gather", "ring"] = "gather"

    # data
    train_data: str | None
    val_data: str | None
    dataset_type: str
    dataset_resampled: bool
    train_num_samples: int | None
    train_data_upsampling_factors: str | None
    csv_img_key: str
    csv_caption_key: str
    csv_separator: str | None
    batch_size: int
    workers: int
    sample_id: str = "index"
    sample_id_table: int | None = None
    check_shards: bool = False
    caption_separator: str | None = None
    caption_key: str | None = None
    view_aug: str = "standard"

    # optimization
    epochs: int
    accum_freq: int
    lr: float
    grad_clip_norm: float | None
    skip_scheduler: bool
    layer_decay: float | None = None
    image_lr: float | None = None
    image_layer_decay: float | None = None
    text_lr: float | None = None
    text_layer_decay: float | None = None

    # evaluation
    imagenet_val: str | None
    imagenet_v2: str | None
    val_frequency: int
    zeroshot_frequency: int
    zero_shot: Sequence[str] = ()
    class_names: str | None = None
    templates: str | None = None
    classes: str | None = None
    probe_train: str | None = None
    probe_val: str | None = None

    # processes
    device: str
    dist_url: str | None
    dist_backend: str | None
    ddp_static_graph: bool
    rank_timeout: float = 300.0

    # what may go wrong
    max_skipped: int = 100
    max_bad: float | None = None

    # what is kept
    name: str | None
    logs: str | None
    resume: str | None
    resume_other_loss: bool = False
    log_local: bool
    log_every_n_steps: int
    profile: int = 0
    debug: bool
    report_to: str
    wandb_notes: str
    wandb_project_name: str
    save_frequency: int
    save_most_recent: bool
    save_best: str | None = None
    save_every_steps: int | None = None
    keep_last: int = 2
    max_minutes: float | None = None
    delete_previous_checkpoint: bool
    copy_codebase: bool
    remote_sync: str | None
    remote_sync_frequency: int
    remote_sync_protocol: str

    def decided(self, **values: Any) -> "RunConfig":
        """The same with other values of flags, for OpenCLIP's functions and the record too."""
        names = {field.name for field in dataclasses.fields(self)}
        own = {name: value for name, value in values.items() if name in names}
        return dataclasses.replace(self, flags=self.flags.replace(**values), **own)

    @property
    def logs_folder(self) -> str | None:
        """`--logs`; None: the run keeps nothing."""
        return None if not self.logs or self.logs.lower() == "none" else self.logs

    def tower_lr(self, tower: str) -> float | None:
        """`--image-lr` or `--text-lr`."""
        return {"image": self.image_lr, "text": self.text_lr}[tower]

    def tower_layer_decay(self, tower: str) -> float | None:
        """`--layer-decay`, or the tower's own."""
        own = {"image": self.image_layer_decay, "text": self.text_layer_decay}[tower]
        return self.layer_decay if own is None else own


#: Fields that are made of a flag's text.
_PARSED: Sequence[str] = ("loss_options", "loss_terms", "lora")


def run_config(flags: upstream.Flags, given: Collection[str] = ()) -> RunConfig:
    """The configuration that flags mean; those of ours that are missing, as in OpenCLIP's own loop, have defaults.

    Raises:
        UserError: text of `--loss-arg`, `--loss-term` or `--lora` that says nothing.
    """
    names = {field.name for field in dataclasses.fields(RunConfig)} - {*_PARSED, "flags", "given"}
    values = {name: value for name, value in vars(flags).items() if name in names}
    lora = getattr(flags, "lora", None)
    return RunConfig(
        flags=flags,
        given=frozenset(given),
        loss_options=parse_assignments(flags.loss_arg, "--loss-arg"),
        loss_terms=parse_terms(flags.loss_term),
        lora=None if lora is None else parse_lora(lora),
        **values,
    )
