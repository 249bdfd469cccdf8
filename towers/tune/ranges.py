"""The range in which `twotower tune` searches each setting where `--space` does not say it.

A range is text: `log:LOW:HIGH` and `linear:LOW:HIGH` for numbers, `A,B,...` for a choice.
"""

FIXED = ""  # the range of what is searched only where --space asks for it

# Settings of every method. Around the settings of the published tables; cosines need a temperature
# of about 0.1, and dot products none, since embeddings may grow.
SETTINGS = {
    "learning_rate": "log:5e-4:5e-2",
    "normalize": "false,true",
    "temperature": "log:0.03:1",
    "l2": "log:1e-8:1e-4",
}
L2_OF_SUMS = "log:1e-4:1e-1"  # with --reduction sum the gradient is larger by the batch size

# A form of published code, or an option that costs memory or time and changes no result much.
_FIXED_OPTIONS = """
    add_log_weights block_size correct_weights count_below draws dro group_size leaf_size
    mask_accidental_hits mix num_buckets num_chosen num_estimated num_hashes num_resampled
    positive_in_mixture positive_in_sum positive_twice published_buckets published_start redraw
    refresh_epochs sum_over_kept swap_shares tau teacher_temperature teacher_weight
    warm_up weight_gradient weights
"""
# Options of methods; the line of a method goes before that of all.
OPTIONS = dict.fromkeys(_FIXED_OPTIONS.split(), FIXED) | {
    "bmns.alpha": "none,0.5,1,2",
    "correct_sfx.alpha": "log:1e-4:1e-1",
    "kernel.alpha": "log:1:100",
    "cache_size": "log:512:8192",
    "cache_weight": "linear:0:1",
    "gamma": "linear:0:1",
    "k": "log:5:100",
    "margin": "linear:0:1",
    "mixture_for_positive": "false,true",
    "num_cached": "log:1024:32768",
    "num_kept": "log:1:16",
    "num_mixed": "log:32:1024",
    "num_negatives": "log:1:16",
    "dns.num_negatives": "log:2:64",
    "dns_mn.num_negatives": "log:32:400",
    "sl_at_k.num_negatives": "log:250:4000",
    "soft_bpr.num_negatives": "log:2:64",
    "softmax_v.num_negatives": "log:32:400",
    "warp.num_negatives": "log:5:100",
    "num_uniform": "none,256,1024,4096",
    "pool_size": "log:50:400",
    "positive_correction": "false,true",
    "power": "linear:0.25:1",
    "rank_scale": "log:50:2000",
    "rho": "log:0.1:10",
    "soft_factor": "linear:0.05:0.4",
    "weight_temperature": "log:2:50",
}
