/* cli/system.c - what the program asks of the operating system beyond standard C: signals, the
 * clock, memory use, terminals, files by name. POSIX, and Windows below. Nothing else in cli/
 * includes a system header. */
#ifndef _WIN32
#define _XOPEN_SOURCE 700
#endif

#include "cli.h"

/* The one piece of global state: a signal handler has no other way in. */
moe_cancel cli_cancel;

#ifndef _WIN32

#include <fcntl.h>
#include <signal.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>

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

/* A standard stream that is closed would be the next file to be opened, and what is printed would
 * go into that file. So they are opened, the wrong way round: using them fails as it should. */
void system_start(int *argc, char ***argv)
{
    (void)argc, (void)argv;
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

int system_screen_columns(FILE *file)
{
    struct winsize size;
    const char *kind = getenv("TERM");
    if (!system_is_terminal(file) || !kind || !strcmp(kind, "dumb"))
        return 0;
    return ioctl(fileno(file), TIOCGWINSZ, &size) == 0 && size.ws_col ? size.ws_col : 80;
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

FILE *system_open_file(const char *path, const char *mode)
{
    return fopen(path, mode);
}

bool system_replace_file(const char *from, const char *to)
{
    return !rename(from, to);
}

void system_remove_file(const char *path)
{
    remove(path);
}

#else /* -------------------------------------------------------------------------- Windows -- */

#define WIN32_LEAN_AND_MEAN
#define PSAPI_VERSION 2 /* GetProcessMemoryInfo without a library of its own */
#include <windows.h>

#include <errno.h>
#include <fcntl.h>
#include <io.h>
#include <psapi.h>
#include <shellapi.h>

static LONG volatile interrupts;

/* The reason of the last failure, for the caller's message. */
static void set_errno(void)
{
    static const struct {
        DWORD code;
        int number;
    } reasons[] = {
        {ERROR_FILE_NOT_FOUND, ENOENT},    {ERROR_PATH_NOT_FOUND, ENOENT},
        {ERROR_INVALID_NAME, ENOENT},      {ERROR_NO_UNICODE_TRANSLATION, EILSEQ},
        {ERROR_ACCESS_DENIED, EACCES},     {ERROR_SHARING_VIOLATION, EACCES},
        {ERROR_LOCK_VIOLATION, EACCES},    {ERROR_WRITE_PROTECT, EROFS},
        {ERROR_ALREADY_EXISTS, EEXIST},    {ERROR_NOT_SAME_DEVICE, EXDEV},
        {ERROR_FILENAME_EXCED_RANGE, ENAMETOOLONG}, {ERROR_NOT_ENOUGH_MEMORY, ENOMEM},
        {ERROR_DISK_FULL, ENOSPC},         {ERROR_HANDLE_DISK_FULL, ENOSPC},
    };
    const DWORD code = GetLastError();
    errno = EIO;
    for (size_t i = 0; i < sizeof reasons / sizeof *reasons; i++)
        if (reasons[i].code == code)
            errno = reasons[i].number;
}

/* Of UTF-8; NULL, and errno set, if it is none or there is no memory. The caller frees it. */
static wchar_t *wide_of(const char *text)
{
    const int n = MultiByteToWideChar(CP_UTF8, MB_ERR_INVALID_CHARS, text, -1, NULL, 0);
    if (n <= 0) {
        set_errno();
        return NULL;
    }
    wchar_t *wide = malloc((size_t)n * sizeof *wide);
    if (wide)
        MultiByteToWideChar(CP_UTF8, 0, text, -1, wide, n);
    else
        errno = ENOMEM;
    return wide;
}

static char *utf8_of(const wchar_t *wide)
{
    const int n = WideCharToMultiByte(CP_UTF8, 0, wide, -1, NULL, 0, NULL, NULL);
    char *text = n > 0 ? malloc((size_t)n) : NULL;
    if (text)
        WideCharToMultiByte(CP_UTF8, 0, wide, -1, text, n, NULL, NULL);
    return text;
}

/* What main() gets is in the code page of the system, in which most texts cannot be written. */
static void system_take_arguments(int *argc, char ***argv)
{
    int n;
    wchar_t **wide = CommandLineToArgvW(GetCommandLineW(), &n);
    char **text = wide ? calloc((size_t)n + 1, sizeof *text) : NULL;
    bool good = text != NULL;
    for (int i = 0; good && i < n; i++)
        good = (text[i] = utf8_of(wide[i])) != NULL;
    if (good) {
        *argc = n;
        *argv = text; /* for as long as the program runs */
    }
    LocalFree(wide);
}

void system_start(int *argc, char ***argv)
{
    DWORD mode;
    const HANDLE screen = GetStdHandle(STD_ERROR_HANDLE);
    system_take_arguments(argc, argv);
    SetConsoleOutputCP(CP_UTF8);
    SetConsoleCP(CP_UTF8);
    if (GetConsoleMode(screen, &mode)) /* for the progress bar */
        SetConsoleMode(screen, mode | ENABLE_VIRTUAL_TERMINAL_PROCESSING);
    _setmode(_fileno(stdin), _O_BINARY);
    _setmode(_fileno(stdout), _O_BINARY);
}

/* Runs in a thread of its own. */
static BOOL WINAPI system_on_interrupt(DWORD event)
{
    if (InterlockedIncrement(&interrupts) > 1)
        ExitProcess(130);
    moe_cancel_set(&cli_cancel);
    return event == CTRL_C_EVENT || event == CTRL_BREAK_EVENT;
}

void system_catch_interrupt(bool by_flag)
{
    SetConsoleCtrlHandler(system_on_interrupt, by_flag);
}

bool system_interrupted(void)
{
    return interrupts != 0;
}

bool system_is_terminal(FILE *file)
{
    return _isatty(_fileno(file)) != 0;
}

int system_screen_columns(FILE *file)
{
    CONSOLE_SCREEN_BUFFER_INFO info;
    const HANDLE screen = (HANDLE)_get_osfhandle(_fileno(file));
    return GetConsoleScreenBufferInfo(screen, &info) ? info.dwSize.X : 0;
}

double system_seconds(void)
{
    LARGE_INTEGER now, per_second;
    QueryPerformanceCounter(&now);
    QueryPerformanceFrequency(&per_second);
    return (double)now.QuadPart / (double)per_second.QuadPart;
}

uint64_t system_peak_rss_bytes(void)
{
    PROCESS_MEMORY_COUNTERS memory;
    return GetProcessMemoryInfo(GetCurrentProcess(), &memory, sizeof memory)
               ? memory.PeakWorkingSetSize : 0;
}

bool system_is_replaceable(const char *path)
{
    wchar_t *wide = wide_of(path);
    const DWORD kind = wide ? GetFileAttributesW(wide) : INVALID_FILE_ATTRIBUTES;
    free(wide);
    return kind == INVALID_FILE_ATTRIBUTES ||
           !(kind & (FILE_ATTRIBUTE_DIRECTORY | FILE_ATTRIBUTE_DEVICE));
}

FILE *system_open_file(const char *path, const char *mode)
{
    wchar_t *wide_path = wide_of(path), *wide_mode = wide_of(mode);
    FILE *file = wide_path && wide_mode ? _wfopen(wide_path, wide_mode) : NULL;
    free(wide_path);
    free(wide_mode);
    return file;
}

bool system_replace_file(const char *from, const char *to)
{
    wchar_t *wide_from = wide_of(from), *wide_to = wide_of(to);
    const bool good = wide_from && wide_to &&
                      MoveFileExW(wide_from, wide_to, MOVEFILE_REPLACE_EXISTING);
    if (wide_from && wide_to && !good)
        set_errno();
    free(wide_from);
    free(wide_to);
    return good;
}

void system_remove_file(const char *path)
{
    wchar_t *wide = wide_of(path);
    if (wide)
        DeleteFileW(wide);
    free(wide);
}

#endif
