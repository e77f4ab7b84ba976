"""One row per method. Definitions and their confidence: docs/baselines.md."""

from __future__ import annotations

from dataclasses import replace

from monkeyjump.methods.formula import Formula
from monkeyjump.methods.row import Method, Table4
from monkeyjump.suggest import check_choice

MJ_PAPER = "Monkey Jump, arXiv:2601.06356"
HIGH = "high: "
OURS = "medium: named in the paper's tables only; the definition is ours"
LEARNED = "learned softmax on each projection's input, the k best renormalized"
LOW_RANK = "r * (i + o)"
ROUTER = Formula("N * i")
ONE = Table4("O(Edr)", "O(Edr)", "2Edr", "0")  # pair A, B per projection
MANY = Table4("O(ENdr)", "O(ENdr)", "2ENdr", "ENd")  # N of them with a router
NO_R2 = "trainable: λ is a vector, r numbers and not r², as the paper's own Figure 2 counts it"
PER_PROJECTION = "router: one per projection, ENd and not Nd, as the paper's own Figure 2 counts them"
DENSE = (
    "time O(K..) would need adapters that skip tokens: here, as in the released code, each is computed for all and "
    "weighed by its gate, and the gates cost Rd more"
)
CENTERS = "space: R centers of width d are kept as buffers, not trained"

PLAIN = (
    Method(
        name="lora",
        title="LoRA",
        base="lora",
        trains="A and B of each projection",
        adapters=Formula(LOW_RANK),
        source="Hu et al., 2021, arXiv:2106.09685",
        sure=HIGH + "PEFT's",
        cost=ONE,
        paper=ONE,
    ),
    Method(
        name="lora-fa",
        title="LoRA-FA",
        base="lora_fa",
        trains="B; A stays as drawn and is saved",
        adapters=Formula("r * o"),
        source="Zhang et al., 2023, arXiv:2308.03303",
        sure=HIGH + "LoRA with A frozen",
        cost=replace(ONE, trainable="Edr"),
        paper=replace(ONE, trainable="Edr"),
    ),
    Method(
        name="adalora",
        title="AdaLoRA",
        base="adalora",
        trains="P, λ and Q of each projection; ranks shrink from init_r (the formula's r) to target_r",
        adapters=Formula("r * (i + o) + r"),
        losses="orthogonality of P and Q",
        unread=("r",),
        source="Zhang et al., 2023, arXiv:2303.10512",
        sure=HIGH + "PEFT's",
        cost=replace(ONE, trainable="E(2dr + r)"),
        paper=replace(ONE, trainable="E(2dr + r²)"),
        remarks=(NO_R2,),
    ),
    Method(
        name="propulsion",
        title="Propulsion",
        base="propulsion",
        trains="one factor per output, raised to a power",
        adapters=Formula("o"),
        source="Kowsher et al., COLING 2025",
        sure=HIGH + "the authors' code",
        cost=Table4("O(Ed)", "O(Ed)", "Ed", "0"),
        paper=Table4("O(Ed)", "O(Ed)", "Ed", "0"),
    ),
)

_REPORTED = {"lora": 270, "lora-fa": 98, "adalora": 271, "propulsion": 49}


def _jumping(plain: Method) -> Method:
    assert plain.paper is not None
    wide = "" if plain.name == "propulsion" else "r"
    return replace(
        plain,
        name=f"mj-{plain.name}",
        title=f"MJ-{plain.title}",
        routed=True,
        routing="no parameters: the k nearest centers, from k-means and then moving averages",
        source=MJ_PAPER,
        sure=HIGH + "the paper's equations; where the released code differs, both are options",
        cost=replace(plain.cost, space=f"O(Ed{wide} + Rd)", time=f"O(Ed{wide} + Rd)"),
        paper=replace(plain.paper, time=f"O(Kd{wide})"),
        reported=_REPORTED[plain.name],
        remarks=(*plain.remarks, DENSE, CENTERS),
    )


JUMPING = tuple(_jumping(plain) for plain in PLAIN)

TRAINABLE = replace(
    JUMPING[0],
    name="mj-lora-trainable",
    title="MJ-LoRA, trainable router",
    trains="A and B of each projection, and the centers",
    options={"center_init": "trainable"},
    router=Formula(block="R * d"),
    routing="as MJ-LoRA, but the centers learn by gradient",
    source=f"{MJ_PAPER}, Fig. 3a",
    sure="medium: the paper shows its result and does not define it further",
    cost=replace(JUMPING[0].cost, router="Rd"),
    paper=None,
    reported=None,
    remarks=(),
)

_MIXTURE = Method(
    name="moe-lora",
    title="MoE-LoRA",
    base="moe_lora",
    trains="N pairs A, B and a router on each projection",
    adapters=Formula("N * r * (i + o)"),
    router=ROUTER,
    routing=LEARNED,
    losses="none; load balance on request",
    source=f"{MJ_PAPER}, Eq. 2 and Table 4",
    sure="medium: the paper's equation; that routers are per projection follows from its counts",
    cost=MANY,
)


def _printed(row: Method, **columns: str) -> Method:
    """With the row of Table 4, which counts one router a block, and in `columns` says something else as well."""
    return replace(row, paper=replace(row.cost, router="Nd", **columns), remarks=(*row.remarks, PER_PROJECTION))


_OF_TABLE_4 = replace(_MIXTURE, source=f"{MJ_PAPER}, Table 4", sure=OURS)

PARALLEL = "32 * d + 16 + d"  # an adapter of bottleneck 16 beside the feed-forward
SIGMOID = "8 * (E + {0}) * d + 4 * (E + {0}) * (E + {0}) + 9 * (E + {0})"  # SwiGLU, 4 wide per adapter
_MOA = Method(
    name="moa",
    title="MoA, soft",
    base="moa",
    trains="A and B, an adapter parallel to the feed-forward, a prompt of 10 vectors in the attention, a router",
    adapters=Formula(LOW_RANK, block=f"{PARALLEL} + 10 * d + H"),
    router=Formula(block=SIGMOID.format(2)),
    routing="one learned sigmoid router per block: a weight for each of its adapters",
    source="Cao et al., 2025, arXiv:2506.05928",
    sure=HIGH + "the authors' code, of which two versions differ in the router's input",
    cost=Table4("O(Edr)", "O(Edr + Ed)", "2Edr + 43d", "O(Ed)"),
    unread=("num_experts", "top_k"),
)

MIXTURES = (
    replace(
        _MIXTURE,
        name="moelora",
        title="MoELoRA",
        base="moelora",
        losses="load balance; contrast between the experts' outputs",
        source="Luo et al., 2024, arXiv:2402.12851",
        sure="forward high; losses low: our reading, their original weights could not be checked",
        reported=1425,
    ),
    Method(
        name="mixlora",
        title="MixLoRA",
        base="mixlora",
        trains="A and B in the attention; N pairs A, B in the feed-forward, whose N copies share one router",
        adapters=Formula(LOW_RANK, feed_forward="N * r * (i + o)"),
        router=Formula(block="N * d if F else 0"),
        routing="learned softmax on the feed-forward's input, the k best networks renormalized",
        losses="load balance, over the tokens of all routers",
        source="Li et al., 2024, arXiv:2404.15159",
        sure=HIGH + "the authors' code",
        cost=Table4(
            "O((E - F + FN)dr)", "O((E - F + kF)dr), and k - 1 frozen down products more", "2(E - F + FN)dr", "Nd"
        ),
        reported=364,
    ),
    replace(
        _MIXTURE,
        name="mixlora-attn",
        title="MixLoRA's variant for the attention",
        base="mixlora_attn",
        losses="load balance",
        source="none: for comparisons that adapt the attention alone",
        sure="not the original, which has no experts in the attention",
    ),
    Method(
        name="hydralora",
        title="HydraLoRA",
        base="hydralora",
        trains="one A, N heads B and a router on each projection",
        adapters=Formula("r * i + N * r * o"),
        router=ROUTER,
        routing="learned softmax on each projection's input, dense (top_k=2 on request)",
        source="Tian et al., 2024, arXiv:2404.19245",
        sure=HIGH + "the authors' code for language models",
        cost=replace(MANY, trainable="(1 + N)Edr"),
        reported=909,
    ),
    replace(
        _MIXTURE,
        name="mola",
        title="MoLA",
        base="mola",
        trains="as MoE-LoRA, with N by layer: 2, 4, 6, 8 from bottom to top",
        losses="load balance, summed over layers",
        source="Gao et al., 2024, arXiv:2402.08562",
        sure=HIGH + "the authors' code; padding is left out of its loss",
    ),
    Method(
        name="more",
        title="MoRE",
        base="more",
        trains="A and B, of which a task uses the first ranks; per-projection gates over ranks; one table of T tasks",
        adapters=Formula(LOW_RANK),
        router=Formula("r * d + r", model="T * d"),
        routing="by task id: the rank that the task's embedding chooses, straight-through; the nearest task if unknown",
        losses="contrast between tasks",
        source="Zhang et al., 2025, arXiv:2505.22694",
        sure="medium: text and released code differ; in the code the gates do not train, here they do",
        cost=replace(ONE, router="E(dr + r), once Td"),
        unread=("num_experts", "top_k"),
    ),
    _MOA,
    replace(
        _MOA,
        name="moa-sparse",
        title="MoA, sparse",
        options={"variant": "sparse"},
        adapters=Formula(LOW_RANK, block=PARALLEL),
        router=Formula(block=f"{SIGMOID.format(1)} + d + 1"),
        routing="one learned sigmoid router per block; adapters below a learned threshold are off",
        cost=replace(_MOA.cost, router="O(Ed)"),
    ),
    _printed(_MIXTURE),
    _printed(
        replace(
            _OF_TABLE_4,
            name="moe-lora-fa",
            title="MoE-LoRA-FA",
            base="moe_lora_fa",
            trains="N matrices B and a router on each projection; A stay as drawn",
            adapters=Formula("N * r * o"),
            cost=replace(MANY, trainable="ENdr"),
            reported=902,
        )
    ),
    _printed(
        replace(
            _OF_TABLE_4,
            name="moe-adalora",
            title="MoE-AdaLoRA",
            base="moe_adalora",
            trains="N triples P, λ, Q and a router on each projection; ranks shrink over all experts together",
            adapters=Formula("N * (r * (i + o) + r)"),
            losses="orthogonality of every expert's P and Q; load balance on request",
            unread=("r",),
            cost=replace(MANY, trainable="EN(2dr + r)"),
            reported=1426,
            remarks=(NO_R2,),
        ),
        trainable="EN(2dr + r²)",
    ),
    _printed(
        replace(
            _OF_TABLE_4,
            name="moe-propulsion",
            title="MoE-Propulsion",
            base="moe_propulsion",
            trains="N factors per output and a router on each projection",
            adapters=Formula("N * o"),
            cost=Table4("O(ENd)", "O(ENd)", "ENd", "ENd"),
        )
    ),
)

METHODS = {row.name: row for row in (*PLAIN, *JUMPING, TRAINABLE, *MIXTURES)}


def method(name: str) -> Method:
    """The row of that name. Raises ValueError with near misses."""
    check_choice("method", name, METHODS)
    return METHODS[name]
