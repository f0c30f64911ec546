"""Names that flags have in other trainers, and what to do here.

From the command lines of Hugging Face's Trainer and accelerate, timm, Lightning, torchrun and
guided-diffusion's other scripts.
"""

from __future__ import annotations

# Our flag -> its names elsewhere. Of several of ours, the first that a program has is meant.
_SAME = {
    "lr": "learning_rate base_lr init_lr blr",
    "iterations": "max_steps max_train_steps train_steps total_steps num_steps steps max_iters "
    "max_iter num_iterations iters n_iters niter total_iters num_train_steps lr_anneal_steps",
    "run_dir out_dir out": "output_dir output outdir output_path save_dir save_path log_dir logdir "
    "logging_dir default_root_dir work_dir workdir checkpoint_dir ckpt_dir results_dir dest out "
    "out_dir name exp_name experiment run_name",
    "data_dir": "data data_path data_root dataset dataset_name dataset_dir train_dir train_data "
    "train_data_dir train_path train_file images",
    "val_data_dir val": "valid val val_dir val_data val_path valid_dir validation validation_dir "
    "validation_data validation_file eval_data eval_data_dir test_dir test_data data_dir",
    "init_from": "pretrained initial_checkpoint finetune finetune_from model_name_or_path "
    "model_path weights init_checkpoint load_from",
    "log_interval": "logging_steps log_every log_freq print_freq log_every_n_steps "
    "logging_interval",
    "save_interval": "save_steps save_every save_freq checkpoint_interval checkpointing_steps "
    "checkpoint_every ckpt_interval snapshot_interval",
    "eval_interval": "eval_steps eval_every eval_freq val_interval val_every val_freq "
    "val_check_interval check_val_every_n_epoch validation_steps",
    "keep_last": "save_total_limit checkpoints_total_limit save_top_k max_checkpoints "
    "checkpoint_hist",
    "warmup_steps": "warmup num_warmup_steps lr_warmup_steps warmup_iters",
    "weight_decay": "wd adam_weight_decay decay",
    "workers": "num_workers dataloader_num_workers loader_workers num_proc nproc j processes",
    "image_size": "resolution img_size imgsz size input_size crop_size im_size",
    "num_classes": "n_classes num_class nclass nb_classes num_labels",
    "random_flip": "hflip flip horizontal_flip fliplr no_flip",
    "random_crop": "crop random_resized_crop center_crop",
    "wandb": "wandb_project use_wandb report_to log_wandb",
    "compile": "torch_compile torchcompile",
    "activation_checkpointing": "gradient_checkpointing grad_checkpointing use_checkpoint",
    "seed": "random_seed manual_seed data_seed",
    "max_minutes": "max_time time_limit",
    "deepspeed_config": "deepscale_config ds_config",
    "classifier_width": "num_channels model_channels width",
    "classifier_depth": "num_res_blocks depth",
    "diffusion_steps": "timesteps num_timesteps num_diffusion_steps num_train_timesteps",
    "noise_schedule": "beta_schedule",
    "classifier_scale": "guidance_scale cfg_scale scale guidance w",
    "classifier_path": "classifier classifier_ckpt run checkpoint",
    "num_samples": "n n_samples samples num_images num",
    "timestep_respacing": "sampling_steps ddim_steps num_inference_steps steps num_steps",
    "use_ddim": "ddim",
    "samples_per_shard": "maxcount shard_size max_count",
    "shuffle_seed": "seed",
    "form": "format image_format encode_format",
    "checkpoints": "ckpt weights",
    "batch_size global_batch": "b bs batch eval_batch_size per_device_eval_batch_size",
}  # fmt: skip

MEANT: dict[str, list[str]] = {}
for _ours, _theirs in _SAME.items():
    for _name in _theirs.split():
        MEANT.setdefault(_name, []).extend(_ours.split())

_PRECISION = (
    "the JSON owns the precision; do: --deepspeed_config zero1_fp16, zero1_bf16 or zero1_fp32"
)
_JSON = (
    "the JSON owns it; do: copy a file of ds_configs/, edit {} and give it as --deepspeed_config"
)
_LAUNCHER = "the launcher has it; do: write it before the script, as in deepspeed --{} ... {}"
_BATCH = "do: give --global_batch, images per step over all ranks, or --batch_size, per rank"
_RESUME = (
    "the same command again continues a run; do: drop it, or --resume_checkpoint PATH for another "
    "checkpoint than the newest"
)
_ARCHITECTURE = "there is one architecture; do: choose its size by --classifier_width and _depth"
_NONE = "there is no such thing here; do: drop it"

# Names with more to say about than another name, in training. {script}: how training is started.
_ADVICE = {
    "fp16 bf16 tf32 amp precision mixed_precision use_fp16 half dtype": _PRECISION,
    "max_grad_norm clip_grad grad_clip gradient_clip_val clip": _JSON.format("gradient_clipping"),
    "opt optim optimizer beta1 beta2 betas adam_beta1 adam_beta2 adam_epsilon eps opt_eps momentum":
        _JSON.format("optimizer"),
    "scheduler sched lr_scheduler lr_scheduler_type min_lr":
        _JSON.format("scheduler") + "; or --lr_schedule",
    "gradient_accumulation_steps accumulate_grad_batches grad_accum_steps accum_iter grad_accum": (
        "it follows from the other sizes; do: give --global_batch and --microbatch, or "
        "gradient_accumulation_steps in the JSON"
    ),
    "train_batch_size total_batch_size": _BATCH,
    "per_device_train_batch_size per_gpu_train_batch_size per_gpu_batch_size batch_size_per_gpu": (
        "do: give --batch_size, images per step and rank; accumulation counts in it"
    ),
    "micro_batch_size train_micro_batch_size_per_gpu": (
        "do: give --microbatch, images per rank and forward pass"
    ),
    "zero_stage stage": _JSON.format("zero_optimization.stage"),
    "warmup_epochs warmup_ratio": "do: give --warmup_steps, a number of steps",
    "resume resume_from resume_from_checkpoint auto_resume ckpt_path resume_path": _RESUME,
    "model arch model_name backbone": _ARCHITECTURE,
    "cpu no_cuda use_cpu device accelerator cuda": (
        "the GPUs of this machine are used, if any; do: set CUDA_VISIBLE_DEVICES= before the "
        "command for the CPU"
    ),
    "gpus devices ngpus": _LAUNCHER.format("num_gpus", "{script}"),
    "ema_rate ema_decay ema model_ema dropout label_smoothing smoothing mixup cutmix drop_path "
    "class_cond aa reprob color_jitter": _NONE,
    "train do_train train_only": "training is what this program does; do: drop it",
    "evaluate do_eval eval eval_only validate test": (
        "do: ds-classifier evaluate RUN; while training, --val_data_dir and --eval_interval"
    ),
    "deepspeed_mpi": (
        "ranks need no MPI; do: drop it, and export MASTER_ADDR and MASTER_PORT before mpirun"
    ),
    "deepscale": "DeepSpeed always trains; do: drop it",
    "overwrite overwrite_output_dir force": "a run is never overwritten; do: choose a --run_dir",
}  # fmt: skip
_OF_THE_LAUNCHER = (
    "num_gpus num_nodes hostfile include exclude master_port master_addr launcher module "
    "nproc_per_node nnodes node_rank"
)
_ADVICE |= {name: _LAUNCHER.format(name, "{script}") for name in _OF_THE_LAUNCHER.split()}
TRAINING_ADVICE = {name: text for names, text in _ADVICE.items() for name in names.split()}

EPOCHS = ("epochs", "num_train_epochs", "max_epochs", "num_epochs", "n_epochs", "nepochs", "epoch")
