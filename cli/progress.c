/* cli/progress.c - the progress bar on stderr.
 *
 * Drawn only on a terminal and only for work that takes more than a moment; erased when done, so
 * that what stays on the screen is the result. */
#include "cli.h"

#include <stdlib.h>
#include <string.h>

static struct {
    bool enabled, drawn;
    double started, last;
    char stage[24];
} bar;

void progress_enable(bool enable)
{
    const char *terminal = getenv("TERM");
    bar.enabled = enable && system_is_terminal(stderr) && terminal && strcmp(terminal, "dumb");
}

void progress_clear(void)
{
    if (bar.drawn)
        fputs("\r\033[K", stderr);
    bar.drawn = false;
    bar.stage[0] = 0;
}

void progress_show(const char *stage, uint64_t done, uint64_t total)
{
    enum { WIDTH = 30 };
    if (!bar.enabled || !total)
        return;
    if (bar.stage[0] && strcmp(bar.stage, stage))
        return; /* a step within the one that is shown */
    double now = system_seconds();
    if (!bar.stage[0]) {
        snprintf(bar.stage, sizeof bar.stage, "%s", stage);
        bar.started = now;
    }
    if (done >= total) {
        progress_clear();
        return;
    }
    if (now - bar.started < 0.5 || now - bar.last < 0.1)
        return;
    bar.last = now;
    bar.drawn = true;
    double part = (double)done / (double)total;
    int full = (int)(part * WIDTH);
    fprintf(stderr, "\r%s [", stage);
    for (int i = 0; i < WIDTH; i++)
        fputc(i < full ? '#' : ' ', stderr);
    fprintf(stderr, "] %3d %%", (int)(part * 100));
    if (part > 0.02)
        fprintf(stderr, ", %.0f s left", (now - bar.started) * (1 - part) / part);
    fputs("\033[K", stderr);
}
