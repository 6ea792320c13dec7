/* cli/system.c - what the program asks of the operating system beyond standard C: signals, the
 * clock, memory use, terminals. POSIX. Nothing else in cli/ includes a system header. */
#define _XOPEN_SOURCE 700

#include "cli.h"

#include <fcntl.h>
#include <signal.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>

/* The one piece of global state: a signal handler has no other way in. */
moe_cancel cli_cancel;
static volatile sig_atomic_t interrupts;

/* The first signal asks the work to stop; whoever does not want to wait sends another. */
static void system_on_interrupt(int signal_number)
{
    if (interrupts++)
        _exit(128 + signal_number);
    moe_cancel_set(&cli_cancel);
}

void system_catch_interrupt(bool by_flag)
{
    struct sigaction action = {.sa_handler = by_flag ? system_on_interrupt : SIG_DFL,
                               .sa_flags = SA_RESTART};
    sigemptyset(&action.sa_mask);
    sigaction(SIGINT, &action, NULL);
    sigaction(SIGTERM, &action, NULL);
}

bool system_interrupted(void)
{
    return interrupts != 0;
}

/* Opened the wrong way round, so that using them fails as it does with a closed one. */
void system_keep_standard_files(void)
{
    for (int fd = 0; fd <= 2; fd++)
        if (fcntl(fd, F_GETFD) < 0 && open("/dev/null", fd ? O_RDONLY : O_WRONLY) != fd)
            return;
}

bool system_is_replaceable(const char *path)
{
    struct stat s;
    return stat(path, &s) || S_ISREG(s.st_mode);
}

bool system_is_terminal(FILE *file)
{
    return isatty(fileno(file)) == 1;
}

double system_seconds(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + (double)t.tv_nsec * 1e-9;
}

uint64_t system_peak_rss_bytes(void)
{
    struct rusage usage;
    if (getrusage(RUSAGE_SELF, &usage))
        return 0;
#ifdef __APPLE__
    return (uint64_t)usage.ru_maxrss;
#else
    return (uint64_t)usage.ru_maxrss * 1024;
#endif
}
