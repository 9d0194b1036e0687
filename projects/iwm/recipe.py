"""IWM: predict the target encoder's tokens of one view from another view, and from what differs between the two.

source x: masked, with changes of colour of its own    target y: the same crop
s_hat_y = predictor(encoder(x), masks, a)              a = action of y - action of x        loss = D(s_hat_y, target(y))
B = images    A = numbers of an action
"""

from __future__ import annotations

from torch import Tensor

from jepa_kit.recipe import JEPA
from jepa_kit.registry import RECIPES
from jepa_kit.structures import START, Output, Progress, View


@RECIPES.register("iwm")
class IWM(JEPA):
    """An image world model (Garrido et al. 2024, arXiv 2403.00504): JEPA between two views, with an action.

    The first view is the source: masked, and seen by the context encoder. The second is the target: whole, and seen by
    the target encoder. Arguments as for JEPA. A predictor without ``uses_action`` is the control: it is not given the
    action.
    """

    num_views = (2, 2)

    def forward(self, *views: View, progress: Progress = START) -> Output:
        """Return the weighted sum of the losses.

        Raises:
            ValueError: the source alone must have masks, both views must have one size, and both or none an action of
                the same numbers.
        """
        source, target = views
        if source.masks is None or target.masks is not None:
            raise ValueError("data.views must have masked: true in the first view, the source, and not in the second")
        if source.images.shape != target.images.shape:
            sizes = [tuple(view.images.shape[2:]) for view in views]
            raise ValueError(f"the views' image_size (={sizes}) must be the same, because patches correspond")
        view = View(source.images, source.masks, difference(source.action, target.action))
        return self.weigh(self.predict(view, progress, of=target.images))


def difference(source: Tensor | None, target: Tensor | None) -> Tensor | None:
    """Return a [B, A], from the source's action to the target's; None if neither has one. It is 0 for equal views.

    Raises:
        ValueError: one has no action, or another number of numbers.
    """
    if source is None and target is None:
        return None
    numbers = [0 if action is None else action.shape[1] for action in (source, target)]
    if source is None or target is None or numbers[0] != numbers[1]:
        raise ValueError(
            f"the views' actions (of {numbers[0]} and {numbers[1]} numbers) must be of the same transforms, with "
            "action: true in both views; p: 0 leaves a transform out of a view"
        )
    return target - source
