"""The configuration's losses: how they are written, what they become, what is refused."""

import dataclasses
import math

import pytest
import torch

from reinforcer_tp import config_loss, preference_losses
from reinforcer_tp.config import ConfigError, DPOConfig, fingerprint, load_config, to_yaml
from reinforcer_tp.loss import LossOptions, dpo_loss, uses_reference

MODEL = "policy.model_name=m"


def dpo(*overrides: str) -> DPOConfig:
    return load_config(None, [MODEL, *(f"dpo.{text}" for text in overrides)]).dpo


def refusal(*overrides: str) -> str:
    with pytest.raises(ConfigError) as caught:
        dpo(*overrides)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_the_names_are_those_of_the_functions():
    """Two lists, since reading a configuration must not import torch."""
    assert set(config_loss.LOSS_NAMES) == set(preference_losses.LOSSES)
    assert config_loss.REFERENCE_FREE == preference_losses.REFERENCE_FREE
    fields = {field.name: field.type for field in dataclasses.fields(DPOConfig)}
    assert fields["f_divergence_type"].__args__ == preference_losses.F_DIVERGENCES
    assert set(config_loss.MEANT).isdisjoint(config_loss.LOSS_NAMES)
    assert set(config_loss.REFUSED).isdisjoint(config_loss.LOSS_NAMES)


DEFAULTS = {"robust": ["label_smoothing=0.1"], "exo_pair": ["label_smoothing=1e-3"]}
DEFAULTS |= {name: ["sft_loss_weight=1"] for name in ("rpo", "orpo")}


@pytest.mark.parametrize("name", config_loss.LOSS_NAMES)
def test_every_loss_can_be_chosen_by_name_alone_or_in_a_list(name):
    needed = DEFAULTS.get(name, [])
    for written in (name, f"[{name}]", f"'{name}'"):
        config = dpo(f"preference_loss={written}", *needed)
        assert config.loss_options["losses"] == ((name, 1.0),)
    options = LossOptions(**config.loss_options)
    assert config.needs_reference is uses_reference(options)
    assert options.sft_average_log_probs is (name in ("rpo", "orpo"))


def test_the_default_is_plain_dpo():
    assert LossOptions(**dpo().loss_options) == LossOptions(beta=0.05)


def test_every_field_of_the_options_is_resolved():
    config = dpo(
        "preference_loss=[sigmoid, discopop,simpo]", "loss_weights=[1, 0.5, 2e-1]",
        "reference_policy_kl_penalty=0.2", "preference_loss_weight=3", "rpo_alpha=0.25",
        "sft_average_log_probs=true", "label_smoothing=0.1", "discopop_tau=0.07",
        "simpo_gamma=1.2", "ld_alpha=0.5",
    )  # fmt: skip
    expected = LossOptions(
        losses=(("sigmoid", 1.0), ("discopop", 0.5), ("simpo", 0.2)),
        beta=0.2,
        preference_loss_weight=3.0,
        sft_loss_weight=0.25,
        sft_average_log_probs=True,
        label_smoothing=0.1,
        discopop_tau=0.07,
        simpo_gamma=1.2,
        ld_alpha=0.5,
    )
    assert LossOptions(**config.loss_options) == expected
    config = dpo("f_divergence_type=alpha_divergence", "f_alpha_divergence_coef=2")
    options = LossOptions(**config.loss_options)
    assert (options.f_divergence_type, options.f_alpha_divergence_coef) == ("alpha_divergence", 2.0)


@pytest.mark.parametrize(
    ("overrides", "needed"),
    [
        ([], True),
        (["preference_loss=simpo"], False),
        (["preference_loss=[simpo,orpo]", "sft_loss_weight=1"], False),
        (["preference_loss=[simpo,hinge]"], True),
        (["preference_loss_weight=0", "sft_loss_weight=1"], False),
    ],
)
def test_when_a_reference_is_needed(overrides, needed):
    assert dpo(*overrides).needs_reference is needed


def test_off_is_a_word(tmp_path):
    assert dpo("first_step_check=off").first_step_check == "off"
    path = tmp_path / "a.yaml"
    path.write_text("policy: {model_name: m}\ndpo: {first_step_check: off}\n")
    config = load_config(str(path), [])
    path.write_text(to_yaml(config))
    assert load_config(str(path), []) == config and config.dpo.first_step_check == "off"


def test_lists_survive_yaml_and_their_order_counts(tmp_path):
    path = tmp_path / "a.yaml"
    path.write_text(
        "policy: {model_name: m}\n"
        "dpo:\n  preference_loss:\n    - sigmoid\n    - bco_pair\n  loss_weights: [1, 0.5]\n"
    )
    config = load_config(str(path), [])
    assert config.dpo.loss_options["losses"] == (("sigmoid", 1.0), ("bco_pair", 0.5))
    path.write_text(to_yaml(config))
    assert load_config(str(path), []) == config
    assert load_config(str(path), ["dpo.loss_weights=[2,3]"]).dpo.loss_weights == [2.0, 3.0]
    other = load_config(str(path), ["dpo.loss_weights=[0.5,1]"])
    assert fingerprint(other) != fingerprint(config)
    alone = ["dpo.preference_loss=hinge", "dpo.loss_weights=null"]
    assert load_config(str(path), alone).dpo.preference_loss == "hinge"


def test_options_that_are_accepted_are_finite_where_the_policy_is_the_reference():
    """Whatever the checks let through at its limits can be computed."""
    limits = [
        ["preference_loss=robust", "label_smoothing=0.49"],
        ["preference_loss=exo_pair", "label_smoothing=1e-9"],
        ["preference_loss=discopop", "discopop_tau=1e-6"],
        ["preference_loss=discopop", "discopop_tau=1"],
        ["preference_loss=ipo", "reference_policy_kl_penalty=1e-3"],
        [
            "preference_loss=[sigmoid,hinge,apo_down]",
            "reference_policy_kl_penalty=0",
            "rpo_alpha=1",
        ],
        ["preference_loss=orpo", "reference_policy_kl_penalty=0", "sft_loss_weight=1"],
        ["f_divergence_type=alpha_divergence", "f_alpha_divergence_coef=-1000"],
        ["f_divergence_type=alpha_divergence", "f_alpha_divergence_coef=1000"],
        ["ld_alpha=0"],
    ]
    for overrides in limits:
        policy = torch.tensor([-1.0, -2.0], requires_grad=True)
        loss, _ = dpo_loss(
            policy, policy.detach(), torch.arange(2), torch.ones(2, dtype=torch.int64),
            torch.ones(1), torch.zeros(1), LossOptions(**dpo(*overrides).loss_options),
        )  # fmt: skip
        loss.backward()
        assert math.isfinite(loss.item()) and bool(policy.grad.isfinite().all()), overrides


REFUSALS = [
    (["preference_loss=sigmoyd"], ("=sigmoyd is unknown", "did you mean sigmoid?", "apo_zero")),
    (["preference_loss=[sigmoid,Hinge]"], ("=Hinge", "did you mean hinge?")),
    (["preference_loss=apo-zero"], ("did you mean apo_zero?",)),
    (["preference_loss=sppo"], ("did you mean sppo_hard?",)),
    (["preference_loss=DPO"], ("did you mean sigmoid?",)),
    (["preference_loss=zzzz"], ("=zzzz is unknown: expected one of sigmoid, ",)),
    (["preference_loss=aot"], ("aot is not supported", "sums over pairs")),
    (["preference_loss=[aot_unpaired]"], ("aot_unpaired is not supported", "sums over pairs")),
    (["preference_loss=[sigmoid,sft]"], ("sft is not supported", "dpo.sft_loss_weight")),
    (["preference_loss=kto"], ("kto is not supported", "bco_pair")),
    (["preference_loss=wpo"], ("wpo is not supported", "weight column")),
    (["preference_loss=null"], ("dpo.preference_loss=null", "expected one of sigmoid")),
    (["preference_loss=[]"], ("dpo.preference_loss=[]", "expected one of sigmoid")),
    (["preference_loss=3"], ("dpo.preference_loss=3", "expected one of sigmoid")),
    (["preference_loss={sigmoid: 1}"], ("'sigmoid': 1", "expected one of sigmoid")),
    (["preference_loss=[[sigmoid]]"], ("[['sigmoid']]", "expected one of sigmoid")),
    (["preference_loss=[hinge,hinge]"], ("names hinge more than once", "sum of its weights")),
    (["loss_weights=[1,2]"], ("got 2 weights for 1 losses (sigmoid)",)),
    (["preference_loss=[sigmoid,hinge]", "loss_weights=[1]"], ("got 1 weights for 2 losses",)),
    (["loss_weights=[-1]"], ("dpo.loss_weights=[-1.0]", "at least 0")),
    (["loss_weights=[.nan]"], ("dpo.loss_weights=[nan]", "finite")),
    (["loss_weights=[0]"], ("dpo.loss_weights=[0.0]", "not all 0")),
    (["loss_weights=1"], ("dpo.loss_weights=1", "a list of numbers or null")),
    (["loss_weights=[a]"], ("loss_weights", "a")),
    (["preference_loss=robust"], ("robust needs dpo.label_smoothing > 0, got null", "=0.1")),
    (["preference_loss=exo_pair", "label_smoothing=0"], ("exo_pair needs", "got 0.0", "=0.001")),
    (["preference_loss=robust", "label_smoothing=0.5"], ("label_smoothing=0.5", "below 0.5")),
    (["label_smoothing=-0.1"], ("label_smoothing=-0.1", "at least 0")),
    (["preference_loss=hinge", "label_smoothing=0.1"], ("not used by dpo.preference_loss=hinge",)),
    (["discopop_tau=0.1"], ("dpo.discopop_tau=0.1 is not used", "only by discopop")),
    (["preference_loss=discopop", "discopop_tau=0"], ("discopop_tau=0.0 is out of range",)),
    (["preference_loss=discopop", "discopop_tau=2"], ("discopop_tau=2.0 is out of range",)),
    (["simpo_gamma=1"], ("dpo.simpo_gamma=1.0 is not used", "only by simpo")),
    (["preference_loss=simpo", "simpo_gamma=-1"], ("simpo_gamma=-1.0 is out of range",)),
    (["preference_loss=simpo", "ld_alpha=0.5"], ("dpo.ld_alpha=0.5 is not used",)),
    (["ld_alpha=1.5"], ("ld_alpha=1.5 is out of range", "from 0 to 1")),
    (["ld_alpha=0.5", "preference_average_log_probs=true"], ("ld_alpha=0.5", "length bias")),
    (["f_alpha_divergence_coef=0.5"], ("f_alpha_divergence_coef=0.5 is not used", "reverse_kl")),
    (["f_divergence_type=kl"], ("f_divergence_type=kl", "reverse_kl, forward_kl")),
    (
        ["preference_loss=[sigmoid,apo_zero]", "f_divergence_type=forward_kl"],
        ("f_divergence_type=forward_kl does not work", "apo_zero, only with sigmoid"),
    ),
    (["preference_loss=simpo", "f_divergence_type=js_divergence"], ("simpo, only with",)),
    *(
        (
            [f"preference_loss={name}", "sft_loss_weight=1", "preference_average_log_probs=true"],
            (f"preference_loss={name} already averages",),
        )
        for name in config_loss.AVERAGING
    ),
    (["preference_loss=rpo"], ("rpo is a preference loss with an SFT term", "> 0, got 0.0")),
    (["preference_loss=orpo"], ("orpo", "dpo.sft_loss_weight > 0, got 0.0")),
    (["rpo_alpha=0.1", "sft_loss_weight=0.2"], ("rpo_alpha=0.1", "sft_loss_weight=0.2", "one of")),
    (["rpo_alpha=-1"], ("rpo_alpha=-1.0 is out of range",)),
    (["preference_loss=ipo", "reference_policy_kl_penalty=0"], ("ipo divides by", "got 0")),
    (["preference_loss=sppo_hard", "reference_policy_kl_penalty=0"], ("sppo_hard divides by",)),
    (["first_step_check=maybe"], ("first_step_check=maybe", "error, warn, off")),
    (["loss_weights={a: 1}"], ("dpo.loss_weights={'a': 1}", "expected")),
    (["preference_loss=[sigmoid,rpo]", "rpo_alpha=1"], ("sigmoid and rpo", "one of them")),
    (["preference_loss=KTO"], ("preference_loss=KTO is not supported", "bco_pair")),
    (["preference_loss_weight=0"], ("trains nothing",)),
    (["reference_policy_kl_penalty=0"], ("trains nothing",)),
]


@pytest.mark.parametrize(("overrides", "parts"), REFUSALS, ids=lambda x: "-".join(x))
def test_losses_and_options_that_do_not_fit_are_one_clear_error(overrides, parts):
    message = refusal(*overrides)
    for part in parts:
        assert part in message


@pytest.mark.parametrize("name", config_loss.LOSS_NAMES)
def test_an_option_is_refused_exactly_where_it_changes_nothing(name):
    """The table of who reads what, against the losses themselves."""
    changes = {"discopop_tau": 0.5, "simpo_gamma": 1.0, "ld_alpha": 0.5, "label_smoothing": 0.2}
    base = {"losses": ((name, 1.0),), "beta": 0.3, "label_smoothing": 0.1}
    for option, value in changes.items():
        losses = []
        for options in (base, base | {option: value}):
            loss, _ = dpo_loss(
                torch.tensor([-1.0, -2.0, -0.5]), torch.tensor([-2.0, -0.2, -0.7]),
                torch.tensor([0, 0, 1]), torch.tensor([2, 1]), torch.ones(1), torch.zeros(1),
                LossOptions(**options),
            )  # fmt: skip
            losses.append(loss.item())
        assert (losses[0] != losses[1]) is (name in config_loss.USED_BY[option]), option
