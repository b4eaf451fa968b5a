/* LD_PRELOAD: the Nth change of a file below a folder, or reading at an offset, fails with an errno, or the process is killed at it.

   faults_arm(folder, n, error): from now on the calls below are counted, where they concern `folder`; the nth (from 1)
   fails with `error`, or, error 0, is a SIGKILL. faults_count() tells how many there were. Single-threaded users only.
*/
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/types.h>
#include <sys/uio.h>
#include <unistd.h>

static char folder[4096];
static int counted, fails_at, error_number;

void faults_arm(const char *path, int n, int error) {
    counted = 0, fails_at = n, error_number = error;
    snprintf(folder, sizeof folder, "%s", path);
}
void faults_disarm(void) { folder[0] = 0; }
int faults_count(void) { return counted; }

static int below(const char *path) { return folder[0] && path && !strncmp(path, folder, strlen(folder)); }
static int below_fd(int fd) {
    char link[64], path[4096];
    if (!folder[0]) return 0;
    snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
    ssize_t n = readlink(link, path, sizeof path - 1);
    if (n < 0) return 0;
    path[n] = 0;
    return below(path);
}
static int fails(void) {
    if (++counted != fails_at) return 0;
    if (!error_number) kill(getpid(), SIGKILL);
    errno = error_number;
    return 1;
}
static int below_at(int dir, const char *path) { return path && path[0] == '/' ? below(path) : below_fd(dir); }

#define REAL(name) __typeof__(&name) real = (__typeof__(&name))dlsym(RTLD_NEXT, #name)
#define ON_FD(result, name, params, args) \
    result name params { REAL(name); return below_fd(fd) && fails() ? -1 : real args; }
#define ON_PATH(name, params, args) \
    int name params { REAL(name); return below(path) && fails() ? -1 : real args; }
#define ON_AT(name, params, args) \
    int name params { REAL(name); return below_at(dir, path) && fails() ? -1 : real args; }
#define OPEN(name, condition, params, args) \
    int name params { \
        va_list more; va_start(more, flags); mode_t mode = va_arg(more, mode_t); va_end(more); \
        REAL(name); return (condition) && (flags & (O_WRONLY | O_RDWR | O_CREAT)) && fails() ? -1 : real args; }

ON_FD(ssize_t, write, (int fd, const void *data, size_t n), (fd, data, n))
ON_FD(ssize_t, writev, (int fd, const struct iovec *data, int n), (fd, data, n))
ON_FD(ssize_t, pwrite64, (int fd, const void *data, size_t n, off64_t at), (fd, data, n, at))
ON_FD(ssize_t, preadv64, (int fd, const struct iovec *data, int n, off64_t at), (fd, data, n, at))
ON_FD(ssize_t, preadv64v2, (int fd, const struct iovec *data, int n, off64_t at, int flags), (fd, data, n, at, flags))
ON_FD(int, fsync, (int fd), (fd))
ON_FD(int, ftruncate64, (int fd, off64_t n), (fd, n))
ON_PATH(mkdir, (const char *path, mode_t mode), (path, mode))
ON_PATH(rmdir, (const char *path), (path))
ON_PATH(unlink, (const char *path), (path))
ON_PATH(rename, (const char *path, const char *to), (path, to))
ON_AT(unlinkat, (int dir, const char *path, int flags), (dir, path, flags))
ON_AT(mkdirat, (int dir, const char *path, mode_t mode), (dir, path, mode))
OPEN(open, below(path), (const char *path, int flags, ...), (path, flags, mode))
OPEN(open64, below(path), (const char *path, int flags, ...), (path, flags, mode))
OPEN(openat, below_at(dir, path), (int dir, const char *path, int flags, ...), (dir, path, flags, mode))
OPEN(openat64, below_at(dir, path), (int dir, const char *path, int flags, ...), (dir, path, flags, mode))
