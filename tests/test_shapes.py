"""Shapes against closed formulas, trimesh and finite differences; damaged files by message."""

import numpy as np
import pytest
import torch
import trimesh

from netspace_lite.shapes import (
    STYLES,
    Transform,
    chair_parts,
    chair_sdf,
    draw_chairs,
    load_deepsdf,
    load_mesh,
    mesh_from_grid,
    mesh_health,
    normalise_mesh,
    sample_chairs,
    sample_mesh,
    winding_number,
)
from netspace_lite.shapes import chairs as family
from netspace_lite.shapes.chairs import _part


@pytest.fixture(scope="module")
def chairs():
    return draw_chairs(24, seed=1)


@pytest.fixture(scope="module")
def parts(chairs):
    return chair_parts(chairs)


def random_points(count, seed=0):
    return 2 * torch.rand(count, 3, generator=torch.Generator().manual_seed(seed)) - 1


def one_part(**options):
    return torch.tensor([[_part((0, 0, 0), **options)]])


class TestChairDistances:
    def test_a_box_is_exact(self):
        points = random_points(2000)
        half = torch.tensor([0.5, 0.3, 0.4])
        outside = (points.abs() - half).clamp(min=0).norm(dim=1)
        expected = outside + (points.abs() - half).amax(1).clamp(max=0)
        torch.testing.assert_close(chair_sdf(one_part(size=(1.0, 0.6, 0.8)), points)[0], expected)

    def test_a_fully_rounded_slab_is_a_sphere(self):
        points = random_points(2000)
        sdf = chair_sdf(one_part(size=(0.8, 0.8, 0.8), edge=0.4), points)[0]
        torch.testing.assert_close(sdf, points.norm(dim=1) - 0.4)

    def test_round_corners_make_a_cylinder(self):
        points = random_points(2000)
        side, end = points[:, [0, 2]].norm(dim=1) - 0.4, points[:, 1].abs() - 0.3
        expected = torch.hypot(side.clamp(min=0), end.clamp(min=0))
        expected += torch.maximum(side, end).clamp(max=0)
        sdf = chair_sdf(one_part(size=(0.8, 0.6, 0.8), corner=0.4), points)[0]
        torch.testing.assert_close(sdf, expected)

    def test_leaning_turns_the_top_backwards(self):
        angle = 0.3
        part = one_part(size=(0.4, 1.0, 0.2), lean=angle)
        turned = random_points(500)
        top = torch.tensor([[0.0, 0.5 * np.cos(angle), -0.5 * np.sin(angle)]])
        torch.testing.assert_close(
            chair_sdf(part, top.float())[0], torch.zeros(1), atol=1e-6, rtol=0
        )
        box = trimesh.creation.box((0.4, 1.0, 0.2))
        box.apply_transform(trimesh.transformations.rotation_matrix(-angle, (1, 0, 0)))
        expected = -trimesh.proximity.signed_distance(box, turned.numpy())
        np.testing.assert_allclose(chair_sdf(part, turned)[0], expected, atol=1e-5)

    def test_never_steeper_than_one(self, parts):
        a = random_points(20_000, 1)
        b = a + 0.05 * torch.randn(a.shape, generator=torch.Generator().manual_seed(2))
        slope = (chair_sdf(parts, a) - chair_sdf(parts, b)).abs() / (a - b).norm(dim=1)
        assert slope.max() <= 1 + 1e-3
        assert slope.max() > 0.99

    def test_gradients_outside_have_length_one(self, parts):
        points = random_points(4000, 3).double()
        step, parts = 1e-5, parts.double()
        shifts = step * torch.eye(3, dtype=torch.float64)
        gradient = torch.stack(
            [chair_sdf(parts, points + s) - chair_sdf(parts, points - s) for s in shifts], -1
        ) / (2 * step)
        outside = chair_sdf(parts, points) > 2 * step
        length = gradient.norm(dim=-1)[outside]
        # Exact distances have it everywhere but where the nearest point changes.
        assert ((length - 1).abs() < 1e-3).float().mean() > 0.998

    @pytest.mark.parametrize("style", ["dining", "ladder", "armchair", "lounge"])
    def test_sharp_chairs_agree_with_trimesh_boxes(self, style, chairs):
        chair = next(c for c in chairs if c.style == style)
        parts = chair_parts([chair._replace(roundness=0.0)])
        points = random_points(200, 4)
        distances = []
        for part in parts[0].double().numpy():
            for side in (1, -1):  # and its mirror image
                box = trimesh.creation.box(2 * part[3:6])
                box.apply_transform(trimesh.transformations.rotation_matrix(-part[6], (1, 0, 0)))
                box.apply_translation(part[:3] * (side, 1, 1))
                distances.append(-trimesh.proximity.signed_distance(box, points.numpy()))
        found = chair_sdf(parts, points)[0]
        np.testing.assert_allclose(found, np.min(distances, axis=0), atol=1e-5)

    def test_own_points_equal_shared_points_and_blocks_do_not_matter(self, parts, monkeypatch):
        points = random_points(301)
        shared = chair_sdf(parts, points)
        monkeypatch.setattr(family, "PAIRS_PER_BLOCK", 1000)
        assert torch.equal(chair_sdf(parts, points.expand(len(parts), -1, -1).clone()), shared)


class TestChairFamily:
    def test_every_style_occurs_and_seeds_matter(self, chairs):
        assert {c.style for c in chairs} == set(STYLES)
        assert len(STYLES) >= 4
        assert chairs[:5] == draw_chairs(5, seed=1)
        assert chairs[:5] != draw_chairs(5, seed=2)

    def test_chairs_are_one_closed_piece(self, parts):
        for mesh in mesh_from_grid(lambda p: chair_sdf(parts, p)):
            assert mesh_health(mesh) == {"exists": True, "watertight": True, "components": 1}

    def test_chairs_fit_the_sphere_and_are_thick_enough(self, parts, chairs):
        points = random_points(4000)
        far = points / points.norm(dim=1, keepdim=True) * 0.96
        assert chair_sdf(parts, far).min() > 0
        assert min(c.thickness for c in chairs) >= 0.1
        assert (2 * parts[:, :, 3:6]).min() >= 0.1

    def test_arms_only_where_the_style_has_them(self, chairs):
        for chair in chairs:
            assert (chair.arm_height > 0) == (chair.style in ("armchair", "lounge"))

    def test_count_must_be_positive(self):
        with pytest.raises(ValueError, match="at least 1 chair, not 0"):
            draw_chairs(0)


class TestSamplingChairs:
    def test_half_inside_within_the_ball_and_true(self, chairs, parts):
        samples = sample_chairs(chairs, 2000, seed=3)
        assert samples.points.shape == (24, 2000, 3)
        assert ((samples.sdf < 0).sum(1) == 1000).all()
        assert samples.points.norm(dim=-1).max() <= 1 + 1e-6
        torch.testing.assert_close(samples.sdf, chair_sdf(parts, samples.points))

    def test_outside_both_near_and_far(self, chairs):
        sdf = sample_chairs(chairs, 2000).sdf
        near = (sdf[sdf > 0] < 0.1).float().mean()
        assert 0.4 < near < 0.9

    def test_more_far_points_on_request(self, chairs):
        few, many = (sample_chairs(chairs[:3], 2000, far=far) for far in (0.25, 0.6))
        assert torch.equal(few.points, sample_chairs(chairs[:3], 2000).points)
        far = [(samples.sdf > 0.15).float().mean() for samples in (few, many)]
        assert far[1] > 1.3 * far[0]
        assert ((many.sdf < 0).float().mean(1) == 0.5).all()
        with pytest.raises(ValueError, match="from 0 to 0.75, so that some hit, not 0.9"):
            sample_chairs(chairs[:1], 100, far=0.9)

    def test_mirror_sides_are_even(self, chairs):
        x = sample_chairs(chairs, 2000).points[..., 0]
        assert abs((x > 0).float().mean() - 0.5) < 0.02

    def test_reproducible(self, chairs):
        first, again, other = (sample_chairs(chairs, 100, seed) for seed in (0, 0, 1))
        assert torch.equal(first.points, again.points)
        assert not torch.equal(first.points, other.points)

    def test_indexing_and_length(self, chairs):
        samples = sample_chairs(chairs, 100)
        assert len(samples[:3]) == 3

    @pytest.mark.parametrize("count", [0, 7, -2])
    def test_odd_counts_are_refused(self, chairs, count):
        with pytest.raises(ValueError, match=f"even number of points.*not {count}"):
            sample_chairs(chairs, count)


class TestMeshes:
    @pytest.mark.parametrize("suffix", ["obj", "ply", "off", "stl"])
    def test_files_are_normalised_and_the_transform_inverts(self, tmp_path, suffix):
        sphere = trimesh.creation.icosphere(3, radius=7.0)
        sphere.apply_translation((100, -20, 3))
        sphere.export(tmp_path / f"ball.{suffix}")
        mesh, transform = load_mesh(tmp_path / f"ball.{suffix}")
        assert np.linalg.norm(mesh.vertices, axis=1).max() == pytest.approx(1)
        assert mesh.is_watertight
        assert mesh.volume == pytest.approx(4 / 3 * np.pi, rel=0.03)
        back = transform.invert(mesh.vertices)
        np.testing.assert_allclose(back.mean(0), (100, -20, 3), atol=0.2)
        np.testing.assert_allclose(transform.apply(back), mesh.vertices, atol=1e-9)

    def test_transform_takes_tensors(self):
        transform = Transform((1.0, 2.0, 3.0), 0.5)
        points = random_points(10)
        torch.testing.assert_close(transform.invert(transform.apply(points)), points)

    def test_sphere_samples_are_the_formula(self):
        mesh = trimesh.creation.icosphere(4)
        samples = sample_mesh(mesh, 1000, seed=1)
        assert (samples.sdf < 0).sum() == 500
        torch.testing.assert_close(samples.sdf, samples.points.norm(dim=-1) - 1, atol=0.005, rtol=0)

    def test_winding_number_agrees_with_trimesh(self):
        mesh, _ = normalise_mesh(trimesh.creation.torus(1.0, 0.4))
        points = random_points(1000)
        inside = winding_number(mesh, points, block=10_000).abs() > 0.5
        assert (inside.numpy() == mesh.contains(points.numpy())).all()

    def test_details_far_from_the_origin_keep_the_sign(self):
        """Seen before: in fp32 points around a sphere of radius 0.001 were inside of it."""
        small = trimesh.creation.icosphere(3, radius=0.001)
        small.apply_translation([0.949, 0, 0])
        way = torch.nn.functional.normalize(random_points(400), dim=-1)
        number = winding_number(small, torch.tensor([0.949, 0, 0]) + way * 0.0011)
        assert number.abs().max() < 1e-3

    def test_inverted_faces_keep_the_sign(self):
        mesh = trimesh.creation.icosphere(2)
        mesh.invert()
        assert (winding_number(mesh, torch.zeros(1, 3)).abs() > 0.5).all()

    def test_a_hole_warns_and_is_bridged(self):
        mesh = trimesh.creation.icosphere(3)
        mesh.update_faces(np.arange(len(mesh.faces)) > 10)
        with pytest.warns(UserWarning, match="not watertight: inside is where the winding"):
            samples = sample_mesh(mesh, 400)
        deep = samples.points.norm(dim=-1) < 0.8
        assert (samples.sdf[deep] < 0).all()

    def test_a_flat_sheet_encloses_nothing(self):
        sheet = trimesh.Trimesh([[0, 0, 0], [1, 0, 0], [0, 1, 0]], [[0, 1, 2]])
        mesh, _ = normalise_mesh(sheet)
        with (
            pytest.warns(UserWarning, match="not watertight"),
            pytest.raises(ValueError, match="encloses next to nothing"),
        ):
            sample_mesh(mesh, 100)

    @pytest.mark.parametrize("flipped", [1, 6, 12])
    def test_faces_wound_both_ways_change_no_sign(self, flipped):
        box = trimesh.creation.box([1, 0.8, 0.6])
        faces = box.faces.copy()
        faces[:flipped] = faces[:flipped, ::-1]
        mesh, placed = normalise_mesh(trimesh.Trimesh(box.vertices, faces, process=False))
        samples = sample_mesh(mesh, 2000)
        beyond = np.abs(placed.invert(samples.points[0].double().numpy())) - [0.5, 0.4, 0.3]
        outside = (beyond.max(1) > 1e-6) == (samples.sdf[0].numpy() > 0)
        assert outside[np.abs(beyond.max(1)) > 1e-4].all()

    def test_faces_without_area_do_not_decide_the_scale(self):
        box = trimesh.creation.box([1, 0.8, 0.6])
        vertices, faces = (
            np.vstack([box.vertices, [[100, 0, 0]]]),
            np.vstack([box.faces, [[0, 0, 8]]]),
        )
        mesh, placed = normalise_mesh(trimesh.Trimesh(vertices, faces, process=False))
        alone, expected = normalise_mesh(box)
        np.testing.assert_allclose(mesh.bounds, alone.bounds, atol=1e-12)
        np.testing.assert_allclose(placed.apply(box.vertices), expected.apply(box.vertices))

    def test_a_mesh_that_was_not_normalised_is_refused(self):
        with pytest.raises(ValueError, match="normalise_mesh first"):
            sample_mesh(trimesh.creation.box((5, 5, 5)), 100)

    @pytest.mark.parametrize(
        ("vertices", "message"),
        [
            ([[0, 0, 0], [1, 0, 0], [0, np.nan, 0]], "1 vertices that are NaN, infinite or beyond"),
            ([[0, 0, 0], [1, 0, 0], [0, 1e20, 0]], r"1 vertices that are .* or beyond 1e\+09"),
            ([[1, 1, 1]] * 3, "single point"),
            ([[0, 0, 0], [1, 0, 0], [2, 0, 0]], "only faces without area"),
        ],
        ids=["nan", "huge", "point", "line"],
    )
    def test_damaged_coordinates(self, vertices, message):
        with pytest.raises(ValueError, match=message):
            normalise_mesh(trimesh.Trimesh(vertices, [[0, 1, 2]], process=False), "it")

    @pytest.mark.parametrize(
        ("name", "content", "message"),
        [
            ("a.obj", "", "cannot be read|no faces"),
            ("a.off", "OFF\n3 0 0\n0 0 0\n1 0 0\n0 1 0\n", "cannot be read|no faces"),
            ("a.ply", "ply\nformat nonsense\n", "cannot be read as a mesh"),
            ("a.txt", "hello", "a.txt is none of .obj, .ply, .off, .stl"),
        ],
    )
    def test_damaged_files(self, tmp_path, name, content, message):
        (tmp_path / name).write_text(content)
        with pytest.raises(ValueError, match=message):
            load_mesh(tmp_path / name)

    def test_missing_file(self, tmp_path):
        with pytest.raises(FileNotFoundError, match="no mesh file"):
            load_mesh(tmp_path / "a.obj")


class TestDeepSDF:
    def save(self, path, **arrays):
        np.savez(path / "a.npz", **arrays)
        return path / "a.npz"

    def rows(self, sign, count=50):
        rows = np.random.default_rng(0).uniform(-0.5, 0.5, (count, 4)).astype(np.float32)
        rows[:, 3] = sign * np.abs(rows[:, 3])
        return rows

    def test_half_from_each_side(self, tmp_path):
        samples = load_deepsdf(self.save(tmp_path, pos=self.rows(1), neg=self.rows(-1)), 60)
        assert samples.points.shape == (1, 60, 3)
        assert (samples.sdf < 0).sum() == 30

    def test_sides_that_are_swapped_are_refused(self, tmp_path):
        with pytest.raises(ValueError, match="no usable row in neg"):
            load_deepsdf(self.save(tmp_path, pos=self.rows(-1), neg=self.rows(1)), 60)

    def test_nan_rows_are_dropped_and_counted(self, tmp_path):
        bad = self.rows(1)
        bad[[1, 4, 7], 2] = np.nan, np.inf, 30.0  # seen before: points in other units were kept
        with pytest.warns(UserWarning, match="dropped 3 rows"):
            samples = load_deepsdf(self.save(tmp_path, pos=bad, neg=self.rows(-1)), 200)
        assert samples.points.abs().max() <= 0.5

    @pytest.mark.parametrize(
        ("arrays", "message"),
        [
            ({"pos": np.zeros((3, 4))}, "lacks neg; it should hold neg, pos"),
            ({"pos": np.zeros((3, 3)), "neg": np.zeros((3, 4))}, "pos should be floats x, y, z"),
            ({"pos": np.zeros((0, 4)), "neg": np.zeros((3, 4))}, "no usable row in pos"),
            ({"pos": np.full((3, 4), 9.0), "neg": np.zeros((3, 4))}, "no usable row in pos"),
            ({"pos": np.array([{}]), "neg": np.zeros((3, 4))}, "pickled"),
        ],
        ids=["missing", "columns", "empty", "units", "pickled"],
    )
    def test_malformed(self, tmp_path, arrays, message):
        with pytest.raises(ValueError, match=message):
            load_deepsdf(self.save(tmp_path, **arrays), 4)

    def test_not_an_npz(self, tmp_path):
        (tmp_path / "a.npz").write_bytes(b"PK\x03\x04 broken")
        with pytest.raises(ValueError, match="is damaged"):
            load_deepsdf(tmp_path / "a.npz")
        with pytest.raises(FileNotFoundError, match="give an .npz"):
            load_deepsdf(tmp_path / "b.npz")


def test_whole_numbers_are_points():
    """Seen before: a centre of a half was cut to none, and winding numbers to whole ones."""
    transform = Transform((0.5, 0.5, 0.5), 2.0)
    points = torch.ones(2, 3, dtype=torch.long)
    assert torch.equal(transform.apply(points), torch.ones(2, 3))
    assert torch.equal(transform.invert(points), torch.ones(2, 3))
    sheet = trimesh.Trimesh([[0, 0, 1], [4, 0, 1], [0, 4, 1]], [[0, 1, 2]])
    found = winding_number(sheet, torch.zeros(1, 3, dtype=torch.long))
    assert torch.equal(found, winding_number(sheet, torch.zeros(1, 3)))
    assert 0 < found.abs() < 1
