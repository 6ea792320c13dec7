/* cli/progress.c - the progress bar on stderr.
 *
 * Drawn only on a terminal and only for work that takes more than a moment; erased when done, so
 * that what stays on the screen is the result. */
#include "cli.h"

#include <string.h>

static struct {
    int columns; // of the terminal; 0: nothing is drawn
    bool drawn;
    double started, last;
    char stage[24];
} bar;

void progress_enable(bool enable)
{
    bar.columns = enable ? system_screen_columns(stderr) : 0;
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
    enum { WIDTH = 30, MAX_LINE = 96 };
    if (!bar.columns || !total)
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
    char hashes[WIDTH + 1] = "", left[32] = "", line[MAX_LINE];
    for (int i = 0; i < WIDTH; i++)
        hashes[i] = i < (int)(part * WIDTH) ? '#' : ' ';
    if (part > 0.02)
        snprintf(left, sizeof left, ", %.0f s left", (now - bar.started) * (1 - part) / part);
    snprintf(line, sizeof line, "%s [%s] %3d %%%s", stage, hashes, (int)(part * 100), left);
    /* A line that is longer than the screen would not be overwritten by the next. */
    fprintf(stderr, "\r%.*s\033[K", bar.columns - 1, line);
}
