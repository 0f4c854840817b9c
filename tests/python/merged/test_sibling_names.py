"""Which layers are called with one tensor, by the code: whenever one is, so are the others."""

from __future__ import annotations

import functools

import pytest
import torch
from torch import nn

from fp8.nn._sibling_names import sibling_names


class Straight(nn.Module):
    def forward(self, x, mask=None):
        q, k = self.q(x), self.k(x)
        if mask is not None:
            q = q * mask
        v = torch.relu(self.v(x).view(2, -1))
        return self.o(q + k + v)


class OneStatement(nn.Module):
    def forward(self, x):
        return self.down(torch.sigmoid(self.gate(x)) * self.up(x))


class Cross(nn.Module):
    """q of one tensor; k and v of another, in either branch, or cached."""

    def forward(self, x, other=None, cache=None):
        q = self.q(x)
        if cache is not None:
            k, v = cache
        elif other is not None:
            k = self.k(other)
            v = self.v(other)
        else:
            k, v = self.k(x), self.v(x)
        return q, k, v


class Decorated(nn.Module):
    @torch.no_grad()
    @functools.wraps(lambda self, x: None)
    def forward(self, x):
        return self.project(x)

    def project(self, y):
        return self.one(y), self.two(y)


class Inherited(Straight):
    pass


class Super(Straight):
    def forward(self, x):
        return super().forward(x) + self.more(x)


class Overridden(Straight):
    """Its own forward calls one of them alone."""

    def forward(self, x):
        return self.q(x) + self.k(x + 1) + self.v(x)


class Assigned(nn.Module):
    def forward(self, x):
        q = self.q(x)
        x = x + 1
        return q + self.k(x)


class AssignedInside(nn.Module):
    def forward(self, x, flag=False):
        q = self.q(x)
        if flag:
            x = x + 1
        return q + self.k(x)


class Loop(nn.Module):
    def forward(self, xs):
        q = self.q(xs)
        for xs in xs:  # noqa: B020
            q = q + xs
        return q + self.k(xs)


class Returns(nn.Module):
    def forward(self, x, short=False):
        q = self.q(x)
        if short:
            return q
        return q + self.k(x)


class Continues(nn.Module):
    def forward(self, x, flags=()):
        y = 0
        for flag in flags:
            y = y + self.q(x)
            if flag:
                continue
            y = y + self.k(x)
        return y


class Maybe(nn.Module):
    def forward(self, x, both=False):
        q = self.q(x)
        return q + (self.k(x) if both else 0) + (both and self.v(x))


class Lazy(nn.Module):
    def forward(self, x):
        later = lambda: self.k(x)  # noqa: E731
        return self.q(x), later


class More(nn.Module):
    def forward(self, x):
        return self.q(x, 1) + self.k(x) + self.v(input=x)


class Elsewhere(nn.Module):
    """Together in the forward, one alone in a method that it reaches."""

    def forward(self, x, cached=False):
        if cached:
            return self.again(x)
        return self.q(x) + self.k(x) + self.v(x)

    def again(self, y):
        return self.q(y)


class Nested(nn.Module):
    def forward(self, x):
        with torch.no_grad():
            for _ in range(2):
                try:
                    y = self.q(x) + self.k(x)
                finally:
                    z = self.a(x) + self.b(x)
        return y + z


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        (Straight, [("q", "k", "v")]),
        (OneStatement, [("gate", "up")]),
        (Cross, [("k", "v")]),
        (Decorated, [("one", "two")]),
        (Inherited, [("q", "k", "v")]),
        (Super, [("q", "k", "v")]),
        (Overridden, [("q", "v")]),
        (Elsewhere, [("k", "v")]),
        (Nested, [("q", "k"), ("a", "b")]),
        (nn.Linear, []),
        (nn.Sequential, []),
        *((kind, []) for kind in (Assigned, AssignedInside, Loop, Returns, Continues, Maybe)),
        *((kind, []) for kind in (Lazy, More)),
    ],
)
def test_sibling_names(kind, expected):
    assert list(sibling_names(kind)) == expected


def test_sibling_names_without_source():
    space = {"nn": nn}
    exec("class Made(nn.Module):\n def forward(self, x):\n  return self.q(x), self.k(x)\n", space)
    assert sibling_names(space["Made"]) == ()
