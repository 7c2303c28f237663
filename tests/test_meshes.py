"""Meshes of known solids, metrics against shifts of known size, and pictures that are drawn."""

import matplotlib
import numpy as np
import pytest
import torch
import trimesh

from netspace_lite.shapes import (
    Slider,
    compare_meshes,
    draw_meshes,
    mesh_from_grid,
    mesh_health,
    within,
)

matplotlib.use("Agg")


def spheres(*radii):
    def evaluate(points):
        return torch.stack([points.norm(dim=1) - radius for radius in radii])

    return evaluate


class TestGrid:
    def test_volume_and_orientation_of_a_sphere(self):
        for mesh, radius in zip(mesh_from_grid(spheres(0.3, 0.7)), (0.3, 0.7), strict=True):
            assert mesh.volume == pytest.approx(4 / 3 * np.pi * radius**3, rel=0.02)
            np.testing.assert_allclose(np.linalg.norm(mesh.vertices, axis=1), radius, atol=0.002)
            assert mesh_health(mesh) == {"exists": True, "watertight": True, "components": 1}

    def test_axes_are_not_swapped(self):
        half = torch.tensor([0.2, 0.4, 0.6])
        mesh = mesh_from_grid(lambda p: (p.abs() - half).amax(1)[None])[0]
        np.testing.assert_allclose(mesh.extents, 2 * half, atol=0.01)

    def test_two_solids_are_two_components(self):
        shift = torch.tensor([0.5, 0, 0])
        mesh = mesh_from_grid(
            lambda p: torch.minimum((p - shift).norm(dim=1), (p + shift).norm(dim=1))[None] - 0.3
        )[0]
        assert mesh_health(mesh)["components"] == 2

    def test_no_surface_is_none(self):
        meshes = mesh_from_grid(lambda p: torch.ones(2, len(p)), resolution=8)
        assert meshes == [None, None]
        assert mesh_health(None) == {"exists": False, "watertight": False, "components": 0}

    def test_a_solid_without_end_is_cut_at_the_unit_ball_and_closed(self):
        mesh = mesh_from_grid(lambda p: p[:, 1][None], resolution=32)[0]
        assert mesh.is_watertight
        assert mesh.volume == pytest.approx(2 / 3 * np.pi, rel=0.03)

    def test_grid_points_on_the_surface_do_no_harm(self):
        # At resolution 65 the planes x = ±0.5 hold grid points.
        mesh = mesh_from_grid(lambda p: p.abs().amax(1)[None] - 0.5, resolution=65)[0]
        assert mesh.is_watertight
        assert mesh.volume == pytest.approx(1, rel=0.01)

    def test_extracted_meshes_are_in_double_precision(self):
        assert mesh_from_grid(spheres(0.5), resolution=16)[0].vertices.dtype == np.float64

    def test_blocks_bound_what_is_evaluated(self):
        sizes = []

        def evaluate(points):
            sizes.append(len(points))
            return spheres(0.5)(points)

        small = mesh_from_grid(evaluate, resolution=20, block=999)[0]
        assert max(sizes) <= 999
        assert sum(sizes) == 20**3
        np.testing.assert_array_equal(
            small.vertices, mesh_from_grid(spheres(0.5), resolution=20)[0].vertices
        )

    @pytest.mark.parametrize(
        ("evaluate", "message"),
        [
            (lambda p: p[:, 0], "evaluate should give"),
            (lambda p: p.T[:, :-1], "evaluate should give"),
            (lambda p: p.T * torch.nan, "NaN or infinite"),
        ],
    )
    def test_wrong_values_are_refused(self, evaluate, message):
        with pytest.raises(ValueError, match=message):
            mesh_from_grid(evaluate, resolution=8)

    def test_wrong_resolution(self):
        with pytest.raises(ValueError, match="at least 4 grid points, not 1"):
            mesh_from_grid(spheres(0.5), resolution=1)

    @pytest.mark.parametrize("suffix", ["ply", "obj"])
    def test_export_round_trip(self, tmp_path, suffix):
        mesh = mesh_from_grid(spheres(0.5), resolution=20)[0]
        mesh.export(tmp_path / f"a.{suffix}")
        again = trimesh.load(tmp_path / f"a.{suffix}")
        assert again.volume == pytest.approx(mesh.volume, rel=1e-4)
        assert again.is_watertight


class TestMetrics:
    def test_a_shape_is_close_to_itself(self):
        sphere = trimesh.creation.icosphere(4, radius=0.5)
        result = compare_meshes(sphere, sphere, samples=10_000)
        assert result["chamfer"] == pytest.approx(0.5 * np.sqrt(sphere.area / 100_000), rel=0.1)
        assert result["normal_consistency"] > 0.99

    def test_concentric_spheres_are_their_radii_apart(self):
        a, b = (trimesh.creation.icosphere(4, radius=r) for r in (0.5, 0.7))
        result = compare_meshes(a, b)
        assert result["chamfer"] == pytest.approx(0.2, rel=0.02)
        assert result["normal_consistency"] > 0.99

    def test_symmetric_up_to_sampling(self):
        a, b = trimesh.creation.box((1, 1, 1)), trimesh.creation.icosphere(3, radius=0.6)
        assert compare_meshes(a, b)["chamfer"] == pytest.approx(
            compare_meshes(b, a)["chamfer"], rel=0.03
        )

    def test_normals_of_a_box_against_a_sphere_are_worse(self):
        a, b = trimesh.creation.box((1, 1, 1)), trimesh.creation.icosphere(3, radius=0.6)
        assert compare_meshes(a, b)["normal_consistency"] < 0.95

    def test_no_mesh_is_refused(self):
        with pytest.raises(ValueError, match="two meshes with faces"):
            compare_meshes(None, trimesh.creation.box())

    def test_within(self):
        target = torch.zeros(2, 4)
        predicted = torch.tensor([[0, 0.005, -0.009, 0.02], [1, 1, 1, 0.0]])
        assert within(predicted, target).tolist() == [0.75, 0.25]


class TestDrawing:
    def test_draws_meshes_and_empty_places(self, tmp_path):
        mesh = mesh_from_grid(spheres(0.6), resolution=32)[0]
        figure = draw_meshes([mesh, None, mesh], ["a", "b", "c"], columns=2, color="#ffffff")
        figure.savefig(tmp_path / "a.png")
        pixels = matplotlib.image.imread(tmp_path / "a.png")[..., :3]
        assert 0.02 < (pixels < 0.95).all(-1).mean() < 0.6
        assert [t.get_text() for t in figure.axes[1].texts] == ["no surface"]
        matplotlib.pyplot.close(figure)

    def test_large_meshes_are_simplified(self):
        figure = draw_meshes([trimesh.creation.icosphere(6)])
        drawn = sum(len(c.get_paths()) for c in figure.axes[0].collections)
        assert 1000 < drawn < 60_000
        matplotlib.pyplot.close(figure)

    def test_a_mesh_may_have_a_color_a_face(self, tmp_path):
        mesh = trimesh.creation.icosphere(3)
        red = np.tile([1.0, 0, 0], (len(mesh.faces), 1))
        figure = draw_meshes([mesh, None], color=[red, "green"])
        figure.savefig(tmp_path / "a.png")
        pixels = matplotlib.image.imread(tmp_path / "a.png")[..., :3]
        assert (pixels[..., 1:] < 0.1).all(-1).mean() > 0.2
        matplotlib.pyplot.close(figure)

    def test_faces_of_a_large_mesh_keep_their_colors(self):
        """Seen before: once it was simplified faces had the colors of others."""
        mesh = trimesh.creation.icosphere(6)
        right = mesh.triangles_center[:, :1] > 0
        figure = draw_meshes([mesh], color=[np.where(right, [1.0, 0, 0], [0, 0, 1.0])], turn=0)
        drawn = figure.axes[0].collections[-1]
        x = np.array([path.vertices[:, 0].mean() for path in drawn.get_paths()])
        red = drawn.get_facecolors()[:, 0] > 0
        assert ((x > 0) == red)[abs(x) > 0.03].all()
        matplotlib.pyplot.close(figure)

    def test_titles_must_match(self):
        with pytest.raises(ValueError, match="1 meshes but 2 titles"):
            draw_meshes([None], ["a", "b"])


def test_a_slider_holds_every_picture_and_shows_the_first():
    page = Slider([draw_meshes([None]) for _ in range(3)])._repr_html_()
    assert page.count("data:image/png;base64,") == 4  # the first one is shown
    assert page.count("<img") == 1
    assert 'max="2"' in page
