"""Laws of a batch's objects, and of the boxes of the background beside them."""

import pytest
import torch
from mmdet.structures import DetDataSample
from mmengine.structures import InstanceData
from test_module import MANY, SIZE, collated, module_of

from ldt.objects import BACKGROUND, background_boxes


def sample(boxes, ignored=(), size=(96, 128)):
    one = DetDataSample(metainfo={"img_shape": size})
    one.gt_instances = InstanceData(
        bboxes=torch.tensor(boxes).float().reshape(-1, 4),
        labels=torch.zeros(len(boxes), dtype=torch.long),
    )
    one.ignored_instances = InstanceData(bboxes=torch.tensor(ignored).float().reshape(-1, 4))
    return one


@pytest.mark.parametrize("seed", range(5))
def test_background_boxes_are_inside_the_image_and_meet_no_box(seed):
    start = torch.rand(6, 2, generator=torch.Generator().manual_seed(seed)) * 80
    boxes = torch.cat([start, start + 15], 1)
    one = sample(boxes[:4].tolist(), boxes[4:].tolist())
    found = background_boxes(one) * torch.tensor([128.0, 96, 128, 96])
    assert len(found) > 0
    assert found.min() >= 0
    assert (found[:, 2] <= 128.001).all()
    assert (found[:, 3] <= 96.001).all()
    torch.testing.assert_close(found[:, 2:] - found[:, :2], torch.full((len(found), 2), 15.0))
    overlap = torch.minimum(found[:, None, 2:], boxes[:, 2:]) - torch.maximum(
        found[:, None, :2], boxes[:, :2]
    )
    assert (overlap.clamp(min=0).prod(-1) < 1e-3).all()
    assert torch.equal(background_boxes(one), background_boxes(one))  # in every pass


def test_without_room_or_objects_there_is_no_background():
    assert background_boxes(sample([[0, 0, 128, 96]])).shape == (0, 4)
    assert background_boxes(sample([[0, 0, 9, 9]], ignored=[[0, 0, 128, 96]])).shape == (0, 4)
    assert background_boxes(sample([])).shape == (0, 4)


@pytest.mark.slow
def test_a_batch_has_the_background_as_a_class_of_its_own():
    adapter = module_of().adapter
    batch = collated(MANY[:2], [1, 1])
    plain = adapter.prepare(batch).objects
    adapter.background = True
    both = adapter.prepare(batch).objects
    assert both.labels.tolist() == [1, 1, BACKGROUND]  # the larger box has no room
    assert both.image.tolist() == [0] * 3
    assert all(map(torch.equal, both.foreground()[:3], plain[:3]))
    assert not torch.equal(both.boxes[2:], plain.boxes)
    height, width = SIZE
    assert (both.boxes[2:] <= torch.tensor([width, height, width, height])).all()


@pytest.mark.slow
def test_background_boxes_follow_a_batch_that_is_resized():
    module = module_of().train()
    module.adapter.background = True

    def halve(inputs, samples):
        for one in samples:
            one.set_metainfo({"img_shape": (SIZE[0] // 2, SIZE[1] // 2)})
            one.gt_instances.bboxes *= 0.5
        return inputs[..., ::2, ::2], samples

    whole = module.adapter.prepare(collated(MANY, [1] * 4)).objects
    module.detector.data_preprocessor.batch_augments = [halve]
    half = module.adapter.prepare(collated(MANY, [1] * 4), training=True).objects
    torch.testing.assert_close(half.boxes, whole.boxes / 2)


@pytest.mark.slow
def test_labels_and_images_stay_on_the_cpu():
    module = module_of().to("meta")  # a device whose values cannot be read
    objects = module.adapter.prepare(collated(MANY, [0, 0, 1, 1]), training=True).objects
    assert objects.boxes.is_meta
    assert objects.labels.tolist() == [0, 0, 1, 1]
    assert objects.image.tolist() == [0] * 4
