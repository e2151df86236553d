"""Every recipe keeps the contract, its terms agree where they should, and its numbers change only on purpose."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from builders import TEXT_WIDTH, VISION_TOKENS, VISION_WIDTH, C, shared_wan_folder
from torch import Tensor, nn

from v4e import config, flow
from v4e.config import Loop
from v4e.errors import CheckpointError, ConfigError, DataError
from v4e.nouns import Draw, EditBatch, Encoded, Levels, Losses, Rollout, Sample, shared_frames
from v4e.recipes import TABLE, pick
from v4e.recipes.flow_matching import FlowMatching
from v4e.recipes.video4edit import Terms, Video4Edit, anchored, shared_tokens

ROOT = Path(__file__).parents[1]
LEVELS = flow.union_grid((1, 2, 4, 8), 3.0)[:-1].float()
t, h, w, t_TEACHER = 2, 4, 4, 3
KEPT = [0, 2]  # the teacher's latent frames that the student makes


# ---------------------------------------------------------------------------------------------------- samples


def sample(number: int, t_teacher: int = t_TEACHER, bow: float = 0.0) -> Sample:
    """A sample made by hand, with a roll-out along a straight path; ``bow`` bends it."""
    g = torch.Generator().manual_seed(number)

    def randn(*shape: int) -> Tensor:
        return torch.randn(shape, generator=g)

    clean, noise, bend = (randn(C, t_teacher, h, w) for _ in range(3))
    s = LEVELS.view(-1, 1, 1, 1, 1)
    x = (1 - s) * clean + s * noise + bow * s * (1 - s) * bend
    v = (noise - clean) + bow * (1 - 2 * s) * bend
    kept = KEPT if t_teacher == t_TEACHER else list(range(t_teacher))
    encoded = Encoded(
        clip_Cthw=randn(C, t, h, w),
        known_Cthw=randn(C, t, h, w),
        text_LE=randn(3 + number % 3, TEXT_WIDTH),
        null_LE=randn(1, TEXT_WIDTH),
        vision_NV=randn(VISION_TOKENS, VISION_WIDTH),
        evolution_LE=randn(5, TEXT_WIDTH),
        teacher_known_Cthw=randn(C, t_teacher, h, w),
        vision_last_NV=randn(VISION_TOKENS, VISION_WIDTH),
        change_thw=torch.rand(t, h, w, generator=g) * 0.1,
    )
    rollout = Rollout(LEVELS, x[:, :, kept], v[:, :, kept], x, clean[:, kept])
    return Sample(f"s{number}", "make it snow", "It snows.", None, None, encoded, rollout)


def samples(count: int = 3, **options) -> list[Sample]:
    return [sample(i, **options) for i in range(count)]


def draw(count: int = 3, seed: int = 0) -> Draw:
    return Draw(seed, tuple(range(count)))


# ---------------------------------------------------------------------------------------------------- players


def on_stage(recipe) -> dict[str, nn.Module]:
    """The players without engines: built, filled, frozen where they do not train."""
    made = {}
    for player in recipe.players():
        module = player.build()
        missing, unexpected = module.load_state_dict(dict(player.weights()), strict=False)
        assert not missing and all("rope" in name for name in unexpected)
        made[player.name] = module.requires_grad_(player.trains)
    return made


def stub(v: Tensor, *hidden: Tensor):
    """A player that says this, whatever it is asked."""
    return lambda x, sigma, conditions, taps=(): (v, *hidden)


def video4edit(**fields) -> Video4Edit:
    base = Video4Edit(
        teacher=str(shared_wan_folder("flf2v")),
        student=str(shared_wan_folder("i2v")),
        attention="native",
        student_blocks=(0, 2),
        teacher_blocks=(0, 2),
        loop=Loop(steps=100),
    )
    return replace(base, **fields)


def flow_matching(**fields) -> FlowMatching:
    base = FlowMatching(init=str(shared_wan_folder("i2v")), attention="native", edit_boost=4.0, loop=Loop(steps=100))
    return replace(base, **fields)


CASES = {
    "video4edit": (video4edit, {}, t_TEACHER),
    "video4edit without blocks": (video4edit, {"student_blocks": (), "teacher_blocks": ()}, t_TEACHER),
    "video4edit, folded": (video4edit, {"attention": "matmul", "fold_text_padding": True}, t_TEACHER),
    "video4edit, recomputed": (video4edit, {"loop": Loop(steps=100, checkpointing=True)}, t_TEACHER),
    "video4edit, guided": (video4edit, {"guidance": 3.0, "own_every": 5}, t_TEACHER),
    "i2v": (flow_matching, {}, t_TEACHER),
    "i2v from the teacher": (flow_matching, {"init": "flf2v"}, t_TEACHER),
    "flf2v from nothing": (
        flow_matching,
        {"init": "flf2v", "fresh": True, "conditioned_on": "first_and_last", "text": "evolution"},
        t,
    ),
}


def case(name: str):
    make, fields, t_teacher = CASES[name]
    if fields.get("init"):
        fields = fields | {"init": str(shared_wan_folder(fields["init"]))}
    return make(**fields), samples(t_teacher=t_teacher)


# --------------------------------------------------------------------------------------------------- contract


@pytest.mark.parametrize("name", CASES)
def test_one_step_is_finite_and_gradients_reach_only_who_trains(name):
    recipe, items = case(name)
    players = on_stage(recipe)
    batch = recipe.batch(items, [1.0] * len(items))
    assert batch.keys == tuple(s.key for s in items)
    for turn in recipe.turns(0):
        made = recipe.losses(players, batch, draw(), turn, step=25)
        assert all(term.isfinite() and term.ndim == 0 for term in made.terms.values())
        made.total.backward()
    for player in recipe.players():
        grads = [p.grad for p in players[player.name].parameters()]
        if player.trains:
            assert all(g is None or g.isfinite().all() for g in grads)
            assert any(g is not None and g.abs().max() > 0 for g in grads)
        else:
            assert grads == [None] * len(grads)


@pytest.mark.parametrize("name", CASES)
def test_recipes_work_on_the_batchs_device(name):
    """Draws are made on the CPU; everything else must be where the batch is. `meta` stands for an accelerator."""
    from v4e.train.loop import to_device

    recipe, items = case(name)
    meta = torch.device("meta")
    players = {p.name: p.build().to(meta) for p in recipe.players()}
    batch = to_device(recipe.batch(items, [1.0] * len(items)), meta)
    made = recipe.losses(players, batch, Draw(0, (0, 1, 2), meta), recipe.turns(0)[0], step=25)
    assert {term.device.type for term in made.terms.values()} == {"meta"}
    made.total.backward()


@pytest.mark.parametrize("name", CASES)
def test_a_loss_is_a_function_of_its_arguments(name):
    recipe, items = case(name)
    players, batch = on_stage(recipe), recipe.batch(items, [1.0] * len(items))
    first, again, other = (told(recipe.losses(players, batch, draw(seed=s), "student", 25)) for s in (0, 0, 1))
    assert first == again and first != other


@pytest.mark.parametrize("name", ["video4edit", "i2v"])
def test_a_quarantined_sample_adds_nothing(name):
    """Whatever stands in its place, the others' losses and gradients stay what they are."""
    recipe, items = case(name)
    players, results = on_stage(recipe), []
    for stand_in in (sample(1), sample(7)):
        stand_in = replace(stand_in, key="damaged", encoded=replace(stand_in.encoded, text_LE=items[1].encoded.text_LE))
        batch = recipe.batch([items[0], stand_in, items[2]], [1.0, 0.0, 1.0])
        made = recipe.losses(players, batch, draw(), "student", 25)
        for module in players.values():
            module.zero_grad(set_to_none=True)
        made.total.backward()
        norms = [p.grad.norm().item() for p in players["student"].parameters() if p.grad is not None]
        results.append((told(made), norms))
    (terms, norms), (other_terms, other_norms) = results
    assert terms == pytest.approx(other_terms, rel=1e-5)
    assert norms == pytest.approx(other_norms, rel=1e-3, abs=1e-6)


def test_samples_without_what_a_recipe_needs_are_named():
    bare = replace(sample(0), encoded=None, rollout=None)
    with pytest.raises(DataError, match="sample s0: has no latents"):
        flow_matching().batch([bare], [1.0])
    with pytest.raises(DataError, match="sample s1: has no teacher roll-out"):
        video4edit().batch([sample(0), replace(sample(1), rollout=None)], [1.0, 1.0])


def test_an_unknown_recipe_names_the_nearest():
    with pytest.raises(ConfigError, match="did you mean video4edit"):
        pick("video4edti")
    assert {pick(name).__name__ for name in TABLE} == {"Video4Edit", "FlowMatching"}


@pytest.mark.parametrize("key", ["teacher", "student", "init"])
def test_a_model_that_is_not_there_is_told_with_its_key(key):
    recipe = flow_matching() if key == "init" else video4edit()
    with pytest.raises(CheckpointError, match=f"^key {key}: no model folder at /nowhere "):
        replace(recipe, **{key: "/nowhere"}).players()


def told(made: Losses) -> dict[str, float]:
    return {name: term.item() for name, term in made.terms.items()}


# ------------------------------------------------------------------------------------------------ video4edit


def stored(bow: float, count: int = 3, **fields) -> tuple[Video4Edit, EditBatch, Tensor]:
    """A recipe that trains at stored states alone, its batch, and d = z_tail - x(0) at the last frame."""
    recipe = video4edit(flow_share=0.0, student_blocks=(), teacher_blocks=(), **fields)
    batch = recipe.batch(samples(count, bow=bow), [1.0] * count)
    offset = torch.zeros_like(batch.clip_BCthw)
    offset[:, :, -1] = batch.clip_BCthw[:, :, -1] - batch.rollout.end_BCthw[:, :, -1]
    return recipe, batch, offset


def test_on_a_straight_path_the_terms_agree():
    """One velocity, the anchored one, brings `velocity`, `trajectory` and `tail` to zero together."""
    recipe, batch, offset = stored(bow=0.0)
    perfect = batch.rollout.v_BKCthw[:, 0] - offset  # the same at every level
    terms = told(recipe.losses({"student": stub(perfect)}, batch, draw(), "student", 25))
    assert terms == pytest.approx({"velocity": 0, "trajectory": 0, "tail": 0, "flow": 0}, abs=1e-9)


def test_the_tail_and_no_other_frame_is_anchored():
    recipe, batch, offset = stored(bow=0.0)
    unanchored = batch.rollout.v_BKCthw[:, 0]
    terms = told(recipe.losses({"student": stub(unanchored)}, batch, draw(), "student", 25))
    assert min(terms["velocity"], terms["trajectory"], terms["tail"]) > 0.01
    kept_B = torch.tensor([0, 3, 7])
    point = anchored(batch, batch.rollout, kept_B)
    rows = torch.arange(3)
    assert torch.equal(point.x_BCthw[:, :, 0], batch.rollout.x_BKCthw[rows, kept_B][:, :, 0])
    assert torch.equal(point.velocity_BCthw[:, :, 0], batch.rollout.v_BKCthw[rows, kept_B][:, :, 0])
    assert torch.allclose(point.end_BCthw[:, :, -1], batch.tail_BChw, atol=1e-6)
    assert torch.equal(point.sigma_B, LEVELS[kept_B])
    assert torch.allclose(point.velocity_BCthw, batch.rollout.v_BKCthw[rows, kept_B] - offset)


def test_on_a_bent_path_velocity_and_trajectory_want_different_things():
    """One level, so that a stub can know where it is asked: the tangent pleases one term, the chord the others."""
    recipe, batch, offset = stored(bow=2.0)
    level = 3
    one = {name: getattr(batch.rollout, name)[:, level : level + 1] for name in ("sigma_BK", "x_BKCthw", "v_BKCthw")}
    batch = replace(batch, rollout=replace(batch.rollout, **one))
    point = anchored(batch, batch.rollout, torch.zeros(3, dtype=torch.long))
    tangent, chord = point.velocity_BCthw, flow.from_x0(point.x_BCthw, point.end_BCthw, point.sigma_B)
    at_tangent, at_chord = (
        told(recipe.losses({"student": stub(v)}, batch, draw(), "student", 25)) for v in (tangent, chord)
    )
    assert at_tangent["velocity"] == 0 and at_tangent["trajectory"] > 0.01 and at_tangent["tail"] > 0.001
    assert at_chord["velocity"] > 0.01 and at_chord["trajectory"] == 0
    assert at_chord["tail"] == pytest.approx(0, abs=1e-9)


def test_the_student_is_asked_at_the_anchored_state_under_the_instruction():
    asked = []
    recipe, batch, offset = stored(bow=1.0, count=4)

    def student(x, sigma, conditions, taps):
        asked.append((x, sigma, conditions, taps))
        return (torch.zeros_like(x),)

    recipe.losses({"student": student}, batch, draw(4), "student", 0)
    ((x, sigma, conditions, taps),) = asked
    kept_B = draw(4).integers("kept", len(LEVELS))
    rows = torch.arange(4)
    assert torch.equal(sigma, LEVELS[kept_B]) and taps == ()
    expected = batch.rollout.x_BKCthw[rows, kept_B] + (1 - flow.like(sigma, x)) * offset
    assert torch.allclose(x, expected, atol=1e-6)
    assert torch.equal(conditions.text_BLE[0, :3], sample(0).encoded.text_LE)
    assert conditions.vision_BNV.shape[0] == 4 and conditions.known_mask_B4thw[:, :, 1].max() == 0


def test_off_the_grid_it_is_flow_matching():
    recipe, batch, _ = stored(bow=1.0)
    recipe = replace(recipe, flow_share=1.0)
    noise = draw().normal("noise", *batch.clip_BCthw.shape[1:])
    perfect = stub(noise - batch.clip_BCthw)
    assert told(recipe.losses({"student": perfect}, batch, draw(), "student", 25)) == dict.fromkeys(
        ("velocity", "trajectory", "tail", "flow"), 0.0
    )
    wrong = told(recipe.losses({"student": stub(noise)}, batch, draw(), "student", 25))
    assert wrong["flow"] > 0.1 and wrong["velocity"] == wrong["trajectory"] == wrong["tail"] == 0


def test_flow_share_is_the_share_of_samples_off_the_grid():
    recipe, batch, _ = stored(bow=0.0, count=2)
    recipe, off = replace(recipe, flow_share=0.25), 0
    for seed in range(200):
        off += (recipe._point(batch, batch.rollout, draw(2, seed)).kept_B < 0).sum().item()
    assert 0.18 < off / 400 < 0.32


def test_own_states_are_where_the_first_step_leads_and_the_paths_end_stays_the_target():
    """A student that answers ``u`` to noise is then asked at noise + (sigma - 1) u, and is right to point at x'_0."""
    recipe, batch, offset = stored(bow=1.0, own_every=2)
    u = draw().normal("any", *batch.clip_BCthw.shape[1:])
    end, asked = batch.rollout.end_BCthw + offset, []

    def student(x, sigma, conditions, taps=()):
        asked.append((x, sigma, torch.is_grad_enabled()))
        return (u if len(asked) == 1 else flow.from_x0(x, end, sigma),)

    made = recipe.losses({"student": student}, batch, draw(), "student", 1)
    (noise, first, graded), (x, sigma, _) = asked
    assert not graded and torch.equal(noise, draw().normal("own", *noise.shape[1:]))
    assert torch.allclose(first, torch.ones(3))
    assert torch.equal(sigma, LEVELS[1:][draw().integers("own_level", len(LEVELS) - 1)])  # a stream of its own
    assert torch.allclose(x, noise + (flow.like(sigma, x) - 1) * u, atol=1e-5)
    assert told(made)["own"] == pytest.approx(0, abs=1e-9)
    assert told(made)["velocity"] == told(made)["trajectory"] == told(made)["tail"] == 0


def test_own_states_lie_no_lower_than_they_may():
    recipe, batch, _ = stored(bow=0.0, count=4, own_every=1, own_from=0.7)
    asked = []

    def student(x, sigma, conditions, taps=()):
        asked.append(sigma)
        return (torch.zeros_like(x),)

    for seed in range(20):
        recipe.losses({"student": student}, batch, draw(4, seed), "student", 0)
    assert set(torch.cat(asked[1::2]).tolist()) == {level for level in LEVELS[1:].tolist() if level >= 0.7}


def test_own_states_above_every_level_are_refused():
    for fields in ({"own_from": 0.97}, {"few_steps": (1,)}):
        with pytest.raises(ConfigError, match=r"own_from and few_steps: no level of the grids of \[1.* is between 0"):
            stored(bow=0.0, own_every=2, **fields)
        stored(bow=0.0, **fields)  # no own states, nothing to refuse


def test_own_states_come_every_so_often_and_leave_flow_matching_alone():
    recipe, batch, _ = stored(bow=0.0, own_every=3)
    student = {"student": stub(torch.zeros_like(batch.clip_BCthw))}
    assert ["own" in recipe.losses(student, batch, draw(), "student", step).terms for step in range(6)] == [
        False, False, True, False, False, True,
    ]  # fmt: skip
    mixed = replace(recipe, flow_share=1.0).losses(student, batch, draw(), "student", 2)
    assert told(mixed)["own"] == 0 and told(mixed)["flow"] > 0.1


@pytest.mark.parametrize("step", [0, 1])
def test_guidance_moves_every_target_by_what_the_prior_makes_of_the_evolution_prompt(step):
    """Stored states and own ones: all terms are zero at data's velocity + (w' - 1) (prior told - prior not told),

    and the more of the picture is edited, the less is w'.
    """
    recipe, batch, offset = stored(bow=0.0, guidance=3.0, own_every=2)
    edited_B = torch.tensor([0.0, 0.25, 1.0])  # of the last latent frame's 16 cells none, four, all
    change = torch.zeros_like(batch.change_Bthw)
    for row, cells in zip(change[:, -1].flatten(1), (0, 4, 16), strict=True):
        row[:cells] = 1.0
    batch = replace(batch, change_Bthw=change)
    told, empty = (draw(seed=s).normal("any", *batch.clip_BCthw.shape[1:]) for s in (5, 6))
    seen = []

    def prior(x, sigma, conditions, taps=()):
        seen.append((x, sigma, conditions, torch.is_grad_enabled()))
        return (told if len(seen) == 1 else empty,)

    def student(x, sigma, conditions, taps=()):
        asked.append((x, sigma))
        unguided = flow.from_x0(x, batch.rollout.end_BCthw + offset, sigma)
        return (unguided + flow.like(2.0 * (1 - edited_B), x) * (told - empty),)

    asked = []
    made = recipe.losses({"student": student, "prior": prior}, batch, draw(), "student", step)
    terms = {name: term.item() for name, term in made.terms.items()}
    assert terms == pytest.approx(dict.fromkeys(made.terms, 0.0), abs=1e-8)
    (x, sigma, conditions, graded), (_, _, nothing, _) = seen
    assert torch.equal(x, asked[-1][0]) and torch.equal(sigma, asked[-1][1]) and not graded
    assert (
        torch.equal(conditions.text_BLE[1], sample(1).encoded.evolution_LE) and conditions.words_B.tolist() == [5] * 3
    )
    assert torch.equal(nothing.text_BLE[1, :1], sample(1).encoded.null_LE) and nothing.words_B.tolist() == [1] * 3
    assert len(conditions.vision_BNV) == 3 and conditions.known_mask_B4thw[:, :, 1].max() == 0  # the source alone


def test_off_the_grid_guidance_moves_flow_matching_too():
    recipe, batch, _ = stored(bow=1.0)
    recipe = replace(recipe, flow_share=1.0, guidance=2.0)
    batch = replace(batch, change_Bthw=torch.zeros_like(batch.change_Bthw))
    noise = draw().normal("noise", *batch.clip_BCthw.shape[1:])
    answers = iter((noise, batch.clip_BCthw))
    players = {"student": stub(2 * (noise - batch.clip_BCthw)), "prior": lambda *_: (next(answers),)}
    assert told(recipe.losses(players, batch, draw(), "student", 25))["flow"] == 0


def test_the_prior_is_cast_only_for_guidance():
    assert [p.name for p in video4edit().players()] == ["student", "teacher"]
    players = video4edit(guidance=2.0, student_blocks=(), teacher_blocks=()).players()
    assert [(p.name, p.trains) for p in players] == [("student", True), ("prior", False)]
    ours, theirs = (dict(p.weights()) for p in players)
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


@pytest.mark.parametrize("make", [video4edit, flow_matching])
def test_frames_stand_apart_in_the_student_and_its_prior(make):
    recipe = make(temporal_skip=3, **({"guidance": 2.0} if make is video4edit else {}))
    built = {p.name: p.build() for p in recipe.players()}
    apart = {name: getattr(model.rope, "temporal_skip_len", 0) for name, model in built.items()}
    assert apart == ({"student": 3, "teacher": 0, "prior": 3} if make is video4edit else {"student": 3})
    recipe.batch(samples(), [1.0] * 3)
    longer = [replace(s, encoded=replace(s.encoded, clip_Cthw=s.encoded.clip_Cthw[:, :1])) for s in samples()]
    with pytest.raises(ConfigError, match="the clips have 1 latent frames, and two alone can stand apart"):
        recipe.batch(longer, [1.0] * 3)


def test_the_handover_moves_weight_from_velocity_to_trajectory():
    terms = Terms(velocity=2.0, trajectory=0.5, tail=0.3, block=0.2, flow=0.7, handover=(0.2, 0.6))
    recipe = video4edit(terms=terms)
    weights = [recipe.weights_at(step) for step in range(101)]
    for step, now in enumerate(weights):
        assert now["velocity"] / 2.0 + now["trajectory"] / 0.5 == pytest.approx(1.0)
        assert (now["tail"], now["block"], now["flow"]) == (0.3, 0.2, 0.7)
        assert now["trajectory"] == 0 or step > 20
        assert now["velocity"] == 0 or step < 60
    assert weights[40]["velocity"] == pytest.approx(1.0)
    assert all(a["velocity"] >= b["velocity"] for a, b in zip(weights, weights[1:], strict=False))


def test_a_handover_at_once():
    recipe = video4edit(terms=Terms(handover=(0.5, 0.5)))
    assert [recipe.weights_at(s)["trajectory"] for s in (49, 50, 51)] == [0.0, 0.0, 1.0]


def test_trajectory_is_trained_at_the_levels_of_the_few_step_grids_alone():
    """All stored levels belong to the 8-step grid, every fourth one to the 2-step grid."""
    recipe, batch, _ = stored(bow=1.0)
    two = replace(recipe, few_steps=(1, 2))
    for level, trained in ((0, True), (1, False), (3, False), (4, True)):
        one = {n: getattr(batch.rollout, n)[:, level : level + 1] for n in ("sigma_BK", "x_BKCthw", "v_BKCthw")}
        at_level = replace(batch, rollout=replace(batch.rollout, **one))
        player = {"student": stub(torch.zeros_like(batch.clip_BCthw))}
        terms = told(two.losses(player, at_level, draw(), "student", 25))
        assert (terms["trajectory"] > 0) == trained and terms["velocity"] > 0 and terms["tail"] > 0
        assert told(recipe.losses(player, at_level, draw(), "student", 25))["trajectory"] > 0


def test_rollouts_that_lack_what_the_terms_need_are_refused():
    with pytest.raises(ConfigError, match=r"do not stop at .* level of the student's few-step grids") as error:
        video4edit(shift=5.0).batch(samples(), [1.0] * 3)
    assert "student_shift=5.0" in error.value.fix
    with pytest.raises(ConfigError, match=r"do not stop at"):
        video4edit(few_steps=(3,)).batch(samples(), [1.0] * 3)
    sets, levels = samples(), flow.union_grid((1, 2, 4, 8), 5.0)[:-1].float()
    sets[1] = replace(sets[1], rollout=replace(sets[1].rollout, sigma_K=levels))  # of a mixture's other set
    with pytest.raises(ConfigError, match=r"do not stop at"):
        video4edit().batch(sets, [1.0] * 3)
    bare = [replace(s, rollout=replace(s.rollout, full_KCthw=s.rollout.full_KCthw[:0])) for s in samples()]
    with pytest.raises(ConfigError, match="no full states"):
        video4edit().batch(bare, [1.0] * 3)
    video4edit(terms=Terms(block=0.0)).batch(bare, [1.0] * 3)


def test_block_is_zero_where_the_student_has_the_teachers_hidden_states():
    recipe = video4edit(flow_share=0.0)
    batch = recipe.batch(samples(), [1.0] * 3)
    theirs = [torch.randn(3, t_TEACHER * 4, 24, generator=torch.Generator().manual_seed(i)) for i in range(2)]
    ours = [shared_tokens(g, t_TEACHER, t) for g in theirs]
    v = torch.zeros_like(batch.clip_BCthw)
    players = {"student": stub(v, *ours), "teacher": stub(v, *theirs)}
    assert told(recipe.losses(players, batch, draw(), "student", 25))["block"] == pytest.approx(0, abs=1e-6)
    swapped = {"student": stub(v, *ours[::-1]), "teacher": stub(v, *theirs)}
    assert told(recipe.losses(swapped, batch, draw(), "student", 25))["block"] > 1
    off_grid = replace(recipe, flow_share=1.0)
    assert told(off_grid.losses(swapped, batch, draw(), "student", 25))["block"] == 0


def test_the_teacher_is_asked_at_its_own_whole_clip():
    asked = []
    recipe = video4edit(flow_share=0.0)
    batch = recipe.batch(samples(), [1.0] * 3)
    tokens = torch.zeros(3, t_TEACHER * 4, 24)

    def teacher(x, sigma, conditions, taps):
        asked.append((x, sigma, conditions, taps))
        return (x, tokens, tokens)

    ours = shared_tokens(tokens, t_TEACHER, t)
    players = {"student": stub(torch.zeros_like(batch.clip_BCthw), ours, ours), "teacher": teacher}
    recipe.losses(players, batch, draw(), "student", 25)
    ((x, sigma, conditions, taps),) = asked
    kept_B = draw().integers("kept", len(LEVELS))
    assert torch.equal(x, batch.rollout.full_BKCthw[torch.arange(3), kept_B]) and torch.equal(sigma, LEVELS[kept_B])
    assert taps == (0, 2) and conditions.vision_BNV.shape[0] == 6
    assert conditions.known_mask_B4thw[0, :, -1].amax((1, 2)).tolist() == [0, 0, 0, 1]


@pytest.mark.parametrize(
    ("long", "short", "kept"),
    [
        (7, 3, (0, 3, 6)),
        (21, 2, (0, 20)),
        (21, 6, (0, 4, 8, 12, 16, 20)),
        (3, 2, (0, 2)),
        (3, 3, (0, 1, 2)),
        (3, 1, (2,)),
    ],
)
def test_shared_tokens_are_those_of_the_shared_frames(long, short, kept):
    h_BSD = torch.arange(float(long)).repeat_interleave(4).view(1, long * 4, 1)
    assert shared_frames(long, short) == kept
    assert shared_tokens(h_BSD, long, short)[0, :, 0].tolist() == [frame for frame in kept for _ in range(4)]


def test_blocks_that_cannot_be_matched_are_refused():
    with pytest.raises(ConfigError, match="1 blocks of the student, 2 of the teacher"):
        video4edit(student_blocks=(0,), teacher_blocks=(0, 2)).players()
    video4edit(student_blocks=(0,), teacher_blocks=(0, 2), terms=Terms(block=0.0)).players()
    recipe = video4edit(flow_share=0.0)
    batch = recipe.batch(samples(), [1.0] * 3)
    wide, narrow = (torch.zeros(3, frames * 4, width) for frames, width in ((t_TEACHER, 24), (t, 16)))
    v = torch.zeros_like(batch.clip_BCthw)
    players = {"student": stub(v, narrow, narrow), "teacher": stub(v, wide, wide)}
    with pytest.raises(ConfigError, match="the student's hidden states have 16 channels, the teacher's 24"):
        recipe.losses(players, batch, draw(), "student", 25)


# --------------------------------------------------------------------------------------------- flow matching


def test_flow_matching_is_zero_at_noise_minus_data():
    recipe = flow_matching()
    batch = recipe.batch(samples(), [1.0] * 3)
    noise = draw().normal("noise", *batch.clip_BCthw.shape[1:])
    assert recipe.losses({"student": stub(noise - batch.clip_BCthw)}, batch, draw(), "student", 0).total == 0


def test_levels_are_uniform_or_logit_normal_and_shifted_after():
    many = Draw(0, tuple(range(4000)))
    plain = flow.draw_sigma(many, Levels(), 3.0)
    assert torch.equal(plain, flow.shift(many.uniform("sigma"), 3.0))
    middle = flow.shift(flow.draw_sigma(many, Levels("logit_normal", -0.5, 0.8), 3.0), 1 / 3.0).logit()
    assert middle.mean().item() == pytest.approx(-0.5, abs=0.05) and middle.std().item() == pytest.approx(0.8, abs=0.05)


@pytest.mark.parametrize(
    "make", [flow_matching, lambda **f: video4edit(flow_share=1.0, student_blocks=(), teacher_blocks=(), **f)]
)
def test_a_recipe_draws_its_levels_as_it_is_told(make):
    recipe, asked = make(levels=Levels("logit_normal", 2.0, 0.5)), []
    batch = recipe.batch(samples(), [1.0] * 3)

    def student(x, sigma, conditions, taps=()):
        asked.append(sigma)
        return (x,)

    recipe.losses({"student": student}, batch, draw(), "student", 1)
    assert torch.allclose(asked[0], flow.draw_sigma(draw(), recipe.levels, recipe.shift))


@pytest.mark.parametrize("share", [0.0, 1.0])
def test_dropped_text_is_the_empty_prompt(share):
    asked = []
    recipe = flow_matching(drop_text=share)
    batch = recipe.batch(samples(), [1.0] * 3)

    def student(x, sigma, conditions):
        asked.append(conditions)
        return (x,)

    recipe.losses({"student": student}, batch, draw(), "student", 0)
    words = [1, 1, 1] if share else [3, 4, 5]
    assert asked[0].words_B.tolist() == words
    expected = sample(2).encoded.null_LE if share else sample(2).encoded.text_LE
    assert torch.equal(asked[0].text_BLE[2, : words[2]], expected) and asked[0].text_BLE[2, words[2] :].abs().sum() == 0


def test_which_text_and_which_frames_a_model_is_told():
    items = samples(t_teacher=t)
    first = flow_matching(text="evolution").batch(items, [1.0] * 3).conditions
    assert first.words_B.tolist() == [5, 5, 5] and len(first.vision_BNV) == 3
    both = flow_matching(conditioned_on="first_and_last", text="evolution").batch(items, [1.0] * 3).conditions
    assert len(both.vision_BNV) == 6  # first and last of each sample, in turn
    assert torch.equal(both.vision_BNV[3], items[1].encoded.vision_last_NV)
    assert torch.equal(both.known_BCthw[1], items[1].encoded.teacher_known_Cthw)


# ------------------------------------------------------------------------------------------------------ draws


def test_a_samples_draws_do_not_depend_on_its_batch():
    together, alone = Draw(3, (10, 11, 12)), Draw(3, (11,))
    for make in (lambda d: d.normal("a", 2, 3), lambda d: d.uniform("b", 4), lambda d: d.integers("c", 8)):
        assert torch.equal(make(together)[1:2], make(alone))
    assert not torch.equal(alone.normal("a", 5), alone.normal("b", 5))
    assert not torch.equal(alone.normal("a", 5), Draw(4, (11,)).normal("a", 5))
    drawn = Draw(0, tuple(range(500))).integers("kept", 8)
    assert sorted(set(drawn.tolist())) == list(range(8))


# ----------------------------------------------------------------------------------------------------- golden

# The nano configs' losses on tiny random models. A change here is a change of what is trained: it needs a line in
# docs/decisions.md that says why. `python tests/test_recipes.py` prints the present values.
GOLDEN: dict[str, dict[str, float]] = {
    "video4edit": {
        "velocity 24": 2.8214244842529297,
        "trajectory 24": 2.3737218379974365,
        "tail 24": 1.7331262826919556,
        "flow 24": 2.168299436569214,
        "block 24": 0.7493565082550049,
        "total 24": 5.684826850891113,
        "velocity 25": 0.0,
        "trajectory 25": 0.0,
        "tail 25": 0.0,
        "flow 25": 2.168299436569214,
        "own 25": 12.589431762695312,
        "total 25": 14.757731437683105,
    },
    "flow_matching": {
        "flow 24": 2.318695545196533,
        "total 24": 2.318695545196533,
        "flow 25": 2.318695545196533,
        "total 25": 2.318695545196533,
    },
}


def golden(recipe_name: str) -> dict[str, float]:
    """Terms and total at two steps in the middle of the hand-over."""
    folders = {"video4edit": [f"teacher={shared_wan_folder('flf2v')}", f"student={shared_wan_folder('i2v')}"]}
    words = folders.get(recipe_name, [f"init={shared_wan_folder('i2v')}"])
    blocks = ["student_blocks=[0,2]", "teacher_blocks=[0,2]"] if recipe_name == "video4edit" else []
    path = ROOT / "configs" / "nano" / f"{recipe_name}.yaml"
    recipe = config.load(path, [*words, *blocks, "loop.steps=100"], pick)
    batch = recipe.batch(samples(8, bow=1.0), [1.0] * 7 + [0.0])
    players, values = on_stage(recipe), {}
    for step in (24, 25):  # one with the block term, one at the student's own states
        made = recipe.losses(players, batch, draw(8), "student", step)
        values |= {f"{name} {step}": value for name, value in told(made).items()} | {f"total {step}": made.total.item()}
    return values


@pytest.mark.parametrize("recipe_name", TABLE)
def test_nothing_drifted(recipe_name: str):
    assert golden(recipe_name) == pytest.approx(GOLDEN[recipe_name], rel=1e-5)


def main(names: Sequence[str] = tuple(TABLE)) -> None:
    for name in names:
        print(f'    "{name}": {golden(name)},')


if __name__ == "__main__":
    main()
