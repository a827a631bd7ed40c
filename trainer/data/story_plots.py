"""All plots of the story generator. Every one is as likely as any other."""

from collections.abc import Callable

from trainer.data.story_cast import Cast
from trainer.data.story_plots_home import broken, gift, learn, rescue, scared, warned
from trainer.data.story_plots_play import lost, newcomer, share, spoiled, stuck, treasure

# A plot more or less changes every story, and with them every cached data set of stories.
PLOTS: tuple[Callable[[Cast], list[str]], ...] = (
    lost,
    stuck,
    share,
    scared,
    broken,
    gift,
    rescue,
    learn,
    warned,
    spoiled,
    treasure,
    newcomer,
)
