"""The measures of a face: what differs from person to person, and how a finding changes it.

Lengths are shares of the picture's side. A person's own measures vary by a few percent; a finding moves its measure
well beyond that. Findings that are not a matter of measure (a cleft, a forelock) are drawn where their name is found in
`Face.findings`.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

RGB = tuple[float, float, float]


@dataclass(frozen=True, slots=True)
class Face:
    """One face. Widths are half widths; `y` grows downwards; angles in radians, positive with the outer side up."""

    findings: frozenset[str]
    sex: str
    age: float
    skin: RGB
    hair: RGB
    iris: RGB
    lips: RGB
    ground: RGB
    cloth: RGB
    light: float  # -1 from the left .. 1 from the right
    glow: float  # brightness of the whole picture
    warmth: float
    noise: float
    style: str  # crop, short, bob, long
    top: float = 0.115
    crown: float = 2.25  # how square the dome of the head is: 2 is a half ellipse
    forehead: float = 0.214
    temple: float = 0.226
    cheekbone: float = 0.227
    cheek: float = 0.208
    jaw: float = 0.160
    chin_width: float = 0.076
    chin: float = 0.815
    neck: float = 0.115
    shoulder: float = 0.905
    eye_y: float = 0.475
    eye_dx: float = 0.110
    eye_width: float = 0.059
    eye_height: float = 0.0305
    slant: float = 0.05
    iris_radius: float = 0.0295
    brow_gap: float = 0.072
    brow_thick: float = 0.0175
    brow_arch: float = 0.014
    nose_y: float = 0.612
    nose_width: float = 0.052
    bridge: float = 0.021
    bridge_depth: float = 1.0
    tip: float = 0.027
    philtrum: float = 0.055
    mouth_width: float = 0.083
    upper_lip: float = 0.021
    lower_lip: float = 0.024
    corner: float = -0.006
    hairline: float = 0.095
    hair_thick: float = 0.030
    ear_y: float = 0.515
    ear_height: float = 0.075
    ear_width: float = 0.038
    ear_tilt: float = 0.10
    skew: float = 0.0  # how far the right half of the face hangs below the left

    @property
    def mouth_y(self) -> float:
        """The line between the lips."""
        return self.nose_y + self.philtrum + self.upper_lip

    @property
    def brow_y(self) -> float:
        return self.eye_y - self.brow_gap

    @property
    def child(self) -> float:
        """1 for a small child, 0 for an adult."""
        return float(np.clip((14 - self.age) / 13, 0, 1))

    def has(self, finding: str) -> bool:
        return finding in self.findings
