"""Which preference losses a configuration asks for, with which options, and whether they fit.

`dpo` arguments are `reinforcer_tp.config.DPOConfig`. Only the standard library is imported; what
the names mean is in `reinforcer_tp.preference_losses`.
"""

import difflib
import math

from reinforcer_tp.config_check import ConfigError, in_range, require, shown

LOSS_NAMES = (
    *("sigmoid", "rpo", "sigmoid_norm", "robust", "hinge", "ipo", "apo_zero", "apo_down"),
    *("sppo_hard", "nca_pair", "bco_pair", "exo_pair", "discopop", "simpo", "orpo"),
)
REFERENCE_FREE = ("simpo", "orpo")
# Averages over tokens by definition, so that averaging before it would do it twice.
AVERAGING = ("sigmoid_norm", "ipo", "simpo", "orpo")
NEEDS_SFT = ("rpo", "orpo")
# Built on the difference of the sides' scores, in which a divergence's normaliser cancels.
ON_SCORE_DIFFERENCE = (
    *("sigmoid", "rpo", "sigmoid_norm", "robust", "hinge", "ipo", "exo_pair", "discopop"),
)
DIVIDES_BY_BETA = ("ipo", "sppo_hard")
# Option -> the losses that read it.
USED_BY = {
    "label_smoothing": ("sigmoid", "rpo", "sigmoid_norm", "robust", "exo_pair", "simpo"),
    "discopop_tau": ("discopop",),
    "simpo_gamma": ("simpo",),
    "ld_alpha": tuple(name for name in LOSS_NAMES if name not in REFERENCE_FREE),
}
REFUSED = {
    "aot": "it sorts log-ratios over the whole batch, and losses here are sums over pairs",
    "aot_pair": "it sorts log-ratios over the whole batch, and losses here are sums over pairs",
    "aot_unpaired": "it sorts log-ratios over the whole batch, and losses here are sums over pairs",
    "sft": "the SFT term has its own key: set dpo.sft_loss_weight (and dpo.preference_loss_weight=0"
    " for SFT alone)",
    "kto": "it learns from single labelled responses, not from pairs; the nearest is bco_pair",
    "kto_pair": "TRL removed it too; the nearest is bco_pair",
    "wpo": "its weights are not built; weights of your own go into the rows' weight column",
}
MEANT = {
    "dpo": "sigmoid",
    "cdpo": "sigmoid with dpo.label_smoothing",
    "rdpo": "robust",
    "irpo": "rpo",
    "odpo": "sigmoid with a margin column",
    "slic": "hinge",
    "cpo": "simpo",
    "ln_dpo": "sigmoid_norm",
    "ld_dpo": "sigmoid with dpo.ld_alpha",
    "sppo": "sppo_hard",
    "nca": "nca_pair",
    "bco": "bco_pair",
    "exo": "exo_pair",
}


def chosen_losses(dpo) -> tuple[tuple[str, float], ...]:
    """(name, weight) of each loss in order. Raises ConfigError for what `check_losses` refuses."""
    given, weights = dpo.preference_loss, dpo.loss_weights
    names = list(given) if isinstance(given, list | tuple) else [given]
    require(
        len(names) > 0 and all(isinstance(name, str) for name in names),
        f"dpo.preference_loss={shown(given)}: expected one of {', '.join(LOSS_NAMES)}, or a list "
        f"of them",
    )
    for name in names:
        _check_name(name)
        require(
            names.count(name) == 1,
            f"dpo.preference_loss={shown(names)} names {name} more than once; name it once and "
            f"give it the sum of its weights in dpo.loss_weights",
        )
    if weights is None:
        return tuple((name, 1.0) for name in names)
    require(
        len(weights) == len(names),
        f"dpo.loss_weights={shown(weights)}: got {len(weights)} weights for {len(names)} losses "
        f"({', '.join(names)}); expected one each",
    )
    require(
        all(math.isfinite(weight) and weight >= 0 for weight in weights) and any(weights),
        f"dpo.loss_weights={shown(weights)}: expected finite numbers that are at least 0 and not "
        f"all 0",
    )
    return tuple(zip(names, map(float, weights), strict=True))


def _check_name(name: str) -> None:
    if name in LOSS_NAMES:
        return
    plain = name.lower().replace("-", "_")
    if plain in REFUSED:
        raise ConfigError(f"dpo.preference_loss={name} is not supported: {REFUSED[plain]}")
    near = difflib.get_close_matches(plain, (*LOSS_NAMES, *MEANT), n=1)
    hint = f"did you mean {MEANT.get(near[0], near[0])}? " if near else ""
    raise ConfigError(
        f"dpo.preference_loss={shown(name)} is unknown: {hint}expected one of "
        f"{', '.join(LOSS_NAMES)}, or a list of them"
    )


def check_losses(dpo) -> None:
    """Refuse losses and options that do not fit together. Raises ConfigError."""
    names = [name for name, _ in chosen_losses(dpo)]
    _check_ranges(dpo)
    _check_used(dpo, names)
    _check_required(dpo, names)
    _check_averages(dpo, names)
    _check_divergence(dpo, names)
    _check_teaches(dpo, names)


def _check_ranges(dpo) -> None:
    require(
        dpo.label_smoothing is None or 0 <= dpo.label_smoothing < 0.5,
        f"dpo.label_smoothing={dpo.label_smoothing}: expected a number that is at least 0 and "
        f"below 0.5, the share of pairs whose labels are swapped",
    )
    in_range(dpo, "dpo", "discopop_tau", 1e-6, 1)  # above 1 its exponential part has no bound
    in_range(dpo, "dpo", "simpo_gamma rpo_alpha", 0)
    in_range(dpo, "dpo", "ld_alpha", 0, 1)
    in_range(dpo, "dpo", "f_alpha_divergence_coef", -1e3, 1e3)
    require(
        dpo.rpo_alpha is None or dpo.sft_loss_weight in (0, dpo.rpo_alpha),
        f"dpo.rpo_alpha={dpo.rpo_alpha} and dpo.sft_loss_weight={dpo.sft_loss_weight} are two "
        f"names of one weight; set one of them",
    )


def _check_teaches(dpo, names: list[str]) -> None:
    """Refuse a loss without a gradient: the run would end as it began."""
    weight, beta = dpo.preference_loss_weight, dpo.reference_policy_kl_penalty
    require(
        dpo.sft_weight > 0 or (weight > 0 and beta > 0),
        f"dpo.preference_loss_weight={weight:g} with dpo.reference_policy_kl_penalty={beta:g} and "
        f"dpo.sft_loss_weight=0 trains nothing; set the first two above 0, or an SFT weight",
    )
    require(
        "rpo" not in names or "sigmoid" not in names,
        "dpo.preference_loss names sigmoid and rpo, which are one loss (rpo needs an SFT weight); "
        "name one of them",
    )


def _check_used(dpo, names: list[str]) -> None:
    for option, users in USED_BY.items():
        value = getattr(dpo, option)
        require(
            value is None or not set(users).isdisjoint(names),
            f"dpo.{option}={value} is not used by dpo.preference_loss={_joined(names)}, only by "
            f"{_joined(users)}; set dpo.{option}=null or choose one of these",
        )
    coefficient, kind = dpo.f_alpha_divergence_coef, dpo.f_divergence_type
    require(
        coefficient is None or kind == "alpha_divergence",
        f"dpo.f_alpha_divergence_coef={coefficient} is not used by dpo.f_divergence_type={kind}, "
        f"only by alpha_divergence; set dpo.f_alpha_divergence_coef=null",
    )


def _check_required(dpo, names: list[str]) -> None:
    for name, suggested in (("robust", 0.1), ("exo_pair", 1e-3)):
        require(
            name not in names or (dpo.label_smoothing or 0) > 0,
            f"dpo.preference_loss={name} needs dpo.label_smoothing > 0, got "
            f"{shown(dpo.label_smoothing)}; its paper uses dpo.label_smoothing={suggested}",
        )
    for name in NEEDS_SFT:
        require(
            name not in names or dpo.sft_weight > 0,
            f"dpo.preference_loss={name} is a preference loss with an SFT term and needs "
            f"dpo.sft_loss_weight > 0, got {dpo.sft_weight}; set dpo.sft_loss_weight=1",
        )
    for name in DIVIDES_BY_BETA:
        require(
            name not in names or dpo.reference_policy_kl_penalty > 0,
            f"dpo.preference_loss={name} divides by dpo.reference_policy_kl_penalty, got 0; "
            f"expected a number above 0, for example 0.1",
        )


def _check_averages(dpo, names: list[str]) -> None:
    if not dpo.preference_average_log_probs:
        return
    averaging = [name for name in names if name in AVERAGING]
    require(
        not averaging,
        f"dpo.preference_average_log_probs=true would average twice: dpo.preference_loss="
        f"{_joined(averaging)} already averages over tokens; set it to false",
    )
    require(
        dpo.ld_alpha is None,
        f"dpo.ld_alpha={dpo.ld_alpha} and dpo.preference_average_log_probs=true are two remedies "
        f"for the same length bias; set one of them to null or false",
    )


def _check_divergence(dpo, names: list[str]) -> None:
    others = [name for name in names if name not in ON_SCORE_DIFFERENCE]
    require(
        dpo.f_divergence_type == "reverse_kl" or not others,
        f"dpo.f_divergence_type={dpo.f_divergence_type} does not work with dpo.preference_loss="
        f"{_joined(others)}, only with {_joined(ON_SCORE_DIFFERENCE)}; use reverse_kl",
    )


def needs_reference(dpo) -> bool:
    """Whether any chosen loss reads the reference's log-probs."""
    names = {name for name, _ in chosen_losses(dpo)}
    return dpo.preference_loss_weight > 0 and not names <= set(REFERENCE_FREE)


def averages_sft(dpo) -> bool:
    """sft_average_log_probs with its null resolved: RPO's and ORPO's papers average."""
    if dpo.sft_average_log_probs is not None:
        return dpo.sft_average_log_probs
    names = {name for name, _ in chosen_losses(dpo)}
    by_name = not names.isdisjoint(NEEDS_SFT) or dpo.rpo_alpha is not None
    return dpo.preference_average_log_probs or by_name


def loss_options(dpo) -> dict[str, object]:
    """The fields of `preference_losses.LossOptions`, nulls resolved."""
    given = {
        "label_smoothing": dpo.label_smoothing,
        "discopop_tau": dpo.discopop_tau,
        "simpo_gamma": dpo.simpo_gamma,
        "ld_alpha": dpo.ld_alpha,
        "f_alpha_divergence_coef": dpo.f_alpha_divergence_coef,
    }
    return {
        "losses": chosen_losses(dpo),
        "beta": dpo.reference_policy_kl_penalty,
        "preference_loss_weight": dpo.preference_loss_weight,
        "sft_loss_weight": dpo.sft_weight,
        "preference_average_log_probs": dpo.preference_average_log_probs,
        "sft_average_log_probs": averages_sft(dpo),
        "f_divergence_type": dpo.f_divergence_type,
    } | {name: value for name, value in given.items() if value is not None}


def _joined(names) -> str:
    return ", ".join(names)
