"""A product with a watched weight is seen, however it is written, and nothing else is."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from mi_experiments.errors import InputError
from mi_experiments.llm.inventory import LinearView
from mi_experiments.llm.matmul_hooks import on_input, replace_output

EXPERT = 2
Product = Callable[[Tensor, Tensor], Tensor]

# Each with a matrix of [rows, columns] or [columns, rows], and x of [tokens, columns].
BY_ROWS: dict[str, Product] = {
    "linear": functional.linear,
    "linear by keyword": lambda x, w: functional.linear(input=x, weight=w),
    "linear with a bias": lambda x, w: functional.linear(x, w, torch.ones(len(w))),
    "@ transposed": lambda x, w: x @ w.T,
    "from the left": lambda x, w: (w @ x.mT).mT,
    "in another dtype": lambda x, w: functional.linear(x.double(), w.double()),
    "type": lambda x, w: functional.linear(x.type(torch.float64), w.type(torch.float64)),
    "through a view": lambda x, w: functional.linear(x, w.view(2, 2, -1).flatten(0, 1)),
}
BY_COLUMNS: dict[str, Product] = {
    "@": lambda x, w: x @ w,
    "matmul": torch.matmul,
    "matmul by keyword": lambda x, w: torch.matmul(x, other=w),
    "mm": torch.mm,
    "method mm": lambda x, w: x.mm(w),
    "addmm": lambda x, w: torch.addmm(torch.ones(w.shape[1]), x, w),
    "linear transposed": lambda x, w: functional.linear(x, w.T),
}
every_product = pytest.mark.parametrize(
    ("product", "transposed"),
    [
        pytest.param(product, transposed, id=name)
        for products, transposed in ((BY_ROWS, False), (BY_COLUMNS, True))
        for name, product in products.items()
    ],
)


class Holder(nn.Module):
    """Owns one matrix and one 3-D parameter."""

    def __init__(self, transposed: bool, device: str = "cpu") -> None:
        super().__init__()
        shape = (6, 4) if transposed else (4, 6)
        self.matrix = nn.Parameter(torch.randn(shape, device=device), requires_grad=False)
        self.experts = nn.Parameter(torch.randn(3, *shape, device=device), requires_grad=False)


def views_of(holder: Holder, transposed: bool) -> tuple[LinearView, LinearView]:
    matrix = LinearView("matrix", holder, "matrix", None, transposed)
    return matrix, LinearView("experts.2", holder, "experts", EXPERT, transposed)


@pytest.mark.parametrize("how", ["matrix", "by number", "by tensor", "unbound"])
@every_product
def test_every_product_is_seen(product: Product, transposed: bool, how: str) -> None:
    holder = Holder(transposed)
    matrix, expert = views_of(holder, transposed)
    linear = matrix if how == "matrix" else expert
    x = torch.randn(5, 6)
    seen: list[tuple[LinearView, Tensor]] = []
    with on_input([matrix, expert], lambda linear, x: seen.append((linear, x))):
        weight = {
            "matrix": lambda: holder.matrix,
            "by number": lambda: holder.experts[EXPERT],
            "by tensor": lambda: holder.experts[torch.tensor(EXPERT)],
            "unbound": lambda: holder.experts.unbind(0)[EXPERT],
        }[how]()
        output = product(x, weight)
    ((found, inputs),) = seen
    assert found is linear
    assert torch.equal(inputs, x)
    assert linear.stored.data_ptr() == weight.data_ptr()
    constant = output - x @ linear.read_weight().T
    assert (constant - constant[0]).abs().max() < 1e-5


@every_product
def test_a_wrong_orientation_is_corrected(product: Product, transposed: bool) -> None:
    holder = Holder(transposed)
    wrong = LinearView("matrix", holder, "matrix", None, not transposed)
    seen: list[LinearView] = []
    with on_input([wrong], lambda linear, x: seen.append(linear)):
        product(torch.randn(5, 6), holder.matrix)
    (found,) = seen
    assert (found.rows, found.columns) == (4, 6) == (wrong.columns, wrong.rows)


@every_product
def test_outputs_are_altered_in_place_of_the_product(product: Product, transposed: bool) -> None:
    holder = Holder(transposed)
    matrix, _ = views_of(holder, transposed)
    x = torch.randn(5, 6)
    with replace_output([matrix], lambda linear, inputs, output: 2 * output + inputs[:, :1]):
        altered, untouched = product(x, holder.matrix), product(x, holder.experts[EXPERT])
    expected = product(x, holder.matrix)
    torch.testing.assert_close(altered, 2 * expected + x[:, :1].to(expected.dtype))
    assert torch.equal(untouched, product(x, holder.experts[EXPERT]))


@pytest.mark.parametrize("transposed", [True, False])
def test_all_experts_in_one_product(transposed: bool) -> None:
    """bmm over a whole 3-D parameter is one product for each slice, as in Llama 4."""
    holder = Holder(transposed)
    linears = [LinearView(f"experts.{e}", holder, "experts", e, transposed) for e in range(3)]
    x = torch.randn(3, 5, 6)
    weight = holder.experts if transposed else holder.experts.mT
    seen: dict[str, Tensor] = {}
    with on_input(linears, lambda linear, x: seen.__setitem__(linear.name, x)):
        output = torch.bmm(x, weight)
    assert [*seen] == ["experts.0", "experts.1", "experts.2"]
    for linear, inputs, result in zip(linears, x, output, strict=True):
        assert torch.equal(seen[linear.name], inputs)
        torch.testing.assert_close(result, inputs @ linear.read_weight().T)
    bias = torch.ones(3, 1, 4)
    with replace_output(linears[1:], lambda linear, inputs, output: torch.zeros_like(output)):
        silenced = torch.baddbmm(bias, x, weight)
    torch.testing.assert_close(silenced[0], output[0] + 1)
    assert not silenced[1:].any()


def test_gradients_arrive_at_each_expert_of_one_product() -> None:
    holder = Holder(True)
    linears = [LinearView(f"experts.{e}", holder, "experts", e, True) for e in range(3)]
    x = torch.randn(3, 5, 6, requires_grad=True)
    gradients: dict[str, Tensor] = {}

    def collect(linear: LinearView, inputs: Tensor, output: Tensor) -> Tensor:
        output.register_hook(lambda gradient: gradients.__setitem__(linear.name, gradient))
        return output

    with replace_output(linears, collect):
        output = torch.bmm(x, holder.experts)
    torch.autograd.grad(output.pow(3).sum(), x)
    for linear, result in zip(linears, output.detach(), strict=True):
        torch.testing.assert_close(gradients[linear.name], 3 * result.square())


def test_nothing_else_is_seen() -> None:
    holder = Holder(False)
    matrix, expert = views_of(holder, False)
    x = torch.randn(5, 6)
    with on_input([matrix, expert], lambda linear, x: pytest.fail(linear.name)):
        holder.matrix * 2 + holder.experts[EXPERT]
        functional.linear(x, holder.matrix + 0)
        functional.linear(x, holder.matrix.exp())
        functional.linear(x, holder.matrix[1:])
        functional.linear(x, holder.experts[0])
        functional.linear(holder.matrix.double(), torch.randn(4, 6).double())
        holder.experts[torch.tensor([0, 1])].sum()
        functional.embedding(torch.tensor([1]), holder.matrix)
        for _ in range(50):  # memory that is freed is used again
            functional.linear(x, holder.matrix.clone())
    functional.linear(x, holder.matrix)


def test_only_the_watched_experts_are_seen() -> None:
    holder = Holder(False)
    seen: list[str] = []
    with on_input([views_of(holder, False)[1]], lambda linear, x: seen.append(linear.name)):
        for expert in range(3):
            functional.linear(torch.randn(2, 6), holder.experts[expert])
        torch.bmm(torch.randn(3, 2, 6), holder.experts.mT)
    assert seen == ["experts.2"] * 2


def test_parameters_are_found_where_they_are_now() -> None:
    """A weight may be replaced between two passes, as by whoever streams them from disk."""
    holder = Holder(False, device="meta")
    matrix, expert = views_of(holder, False)
    assert (matrix.rows, matrix.columns, expert.rows, expert.columns) == (4, 6, 4, 6)
    x, seen = torch.randn(5, 6), []
    for value in (1.0, 2.0):
        holder.matrix = nn.Parameter(torch.full((4, 6), value), requires_grad=False)
        holder.experts = nn.Parameter(torch.full((3, 4, 6), value), requires_grad=False)
        with on_input([matrix, expert], lambda linear, x: seen.append(linear)):
            functional.linear(x, holder.matrix)
            functional.linear(x, holder.experts[EXPERT])
        assert (expert.read_weight() == value).all()
    assert seen == [matrix, expert] * 2
    expert.write_weight(torch.zeros(4, 6))
    assert (holder.experts == 0).flatten(1).all(1).tolist() == [False, False, True]


def test_weights_without_numbers_are_told_apart() -> None:
    holder = Holder(False, device="meta")
    linears = [LinearView(f"experts.{e}", holder, "experts", e) for e in range(3)]
    x = torch.empty(5, 6, device="meta")
    seen: list[str] = []
    with on_input(
        [*linears, views_of(holder, False)[0]], lambda linear, x: seen.append(linear.name)
    ):
        functional.linear(x, holder.experts[1])
        functional.linear(x, holder.matrix)
        chosen = holder.experts[torch.zeros(5, dtype=torch.int64, device="meta")]
        torch.bmm(chosen, x.unsqueeze(-1))
    # Who is chosen is not known: it may be any of them.
    assert seen == ["experts.1", "matrix", "experts.0", "experts.1", "experts.2"]


def test_experts_that_run_together_are_refused() -> None:
    holder = Holder(False)
    x, chosen = torch.randn(5, 6), torch.tensor([0, 0, 1, 2, 2])
    offsets = torch.tensor([2, 3, 5], dtype=torch.int32)
    refused = pytest.raises(InputError, match=r"experts\.2 .*experts_implementation='eager'")
    with on_input(views_of(holder, False), lambda linear, x: None):
        with refused:
            torch.bmm(holder.experts[chosen], x.unsqueeze(-1))
        with refused:
            functional.grouped_mm(x, holder.experts.mT, offs=offsets)


def test_a_tensor_in_a_wider_dtype_is_the_tensor() -> None:
    holder = Holder(False).to(torch.bfloat16)
    (matrix, _), x = views_of(holder, False), torch.randn(5, 6).bfloat16()
    seen: list[Tensor] = []
    with on_input([matrix], lambda linear, x: seen.append(x)):
        functional.linear(x.float(), holder.matrix.float())
        functional.linear(x.float().bfloat16(), holder.matrix)
        wide = x.float()
        x.mul_(2)
        functional.linear(wide, holder.matrix.float())
    first, second, third = seen
    assert first is x
    assert second is not x
    assert third is wide


def test_callbacks_may_end_the_pass() -> None:
    holder = Holder(False)
    ran: list[str] = []

    def read(linear: LinearView, x: Tensor) -> None:
        raise ZeroDivisionError

    def run() -> None:
        with on_input(views_of(holder, False), read):
            ran.append("before")
            functional.linear(torch.randn(5, 6), holder.matrix)
            ran.append("after")

    with pytest.raises(ZeroDivisionError):
        run()
    assert ran == ["before"]
    functional.linear(torch.randn(5, 6), holder.matrix)
