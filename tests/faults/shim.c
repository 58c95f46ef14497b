/* Makes the N-th file-system call under a path fail, in a program that is started with this in LD_PRELOAD.

   A program arms it by ctypes: faults_arm(path, n, mode), where n counts calls from 1 and 0 only counts. Paths that are
   given relative to a folder's descriptor are resolved. What C libraries call among themselves, and memory maps, it does
   not see. The idea of an armed counter a path is that of libfiu and of ALICE's crash points (Pillai et al., OSDI 2014). */
#define _GNU_SOURCE
#include <dirent.h>
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/types.h>
#include <sys/uio.h>
#include <unistd.h>

enum mode { COUNT, KILL, HALF_THEN_KILL, IO_ERROR, NO_SPACE, SHORT, FULL_FROM_HERE, DEAD, HALF_THEN_DEAD };

static char prefix[4096], names[1 << 21];
static __thread char whole[8192];  /* the path that was looked at last */
static long calls, at;
static int mode;

void faults_arm(const char *path, long n, int how) {
  strncpy(prefix, path, sizeof prefix - 1);
  __atomic_store_n(&calls, 0, __ATOMIC_SEQ_CST);
  names[0] = 0, at = n, mode = how;
}
void faults_disarm(void) { prefix[0] = 0; }
long faults_calls(void) { return calls; }
const char *faults_names(void) { return names; }

static int under(const char *path) { return prefix[0] && !strncmp(path, prefix, strlen(prefix)); }

static int of_path(int folder, const char *path) {
  char link[64];
  ssize_t n = 0;
  if (!prefix[0] || !path) return 0;
  if (path[0] == '/') return strncpy(whole, path, sizeof whole - 1), under(whole);
  if (folder == AT_FDCWD) {
    if (!getcwd(whole, 4000)) return 0;
  } else {
    snprintf(link, sizeof link, "/proc/self/fd/%d", folder);
    if ((n = readlink(link, whole, 4000)) < 0) return 0;
    whole[n] = 0;
  }
  strncat(whole, "/", 2), strncat(whole, path, 4000);
  return under(whole);
}

static int of_file(int file) {
  char link[64];
  if (!prefix[0]) return 0;
  snprintf(link, sizeof link, "/proc/self/fd/%d", file);
  ssize_t n = readlink(link, whole, sizeof whole - 1);
  if (n < 0) return 0;
  whole[n] = 0;
  return under(whole);
}

static void die(void) {
  kill(getpid(), SIGKILL);
  for (;;) pause();
}

/* 0: go on; 1: fail with errno set; 2: do half. `grows`: whether the call may need space. */
static int hit(const char *name, int grows, int writes) {
  long call = __atomic_add_fetch(&calls, 1, __ATOMIC_SEQ_CST);
  if (strlen(names) + strlen(whole) + 32 < sizeof names) strcat(strcat(strcat(strcat(names, name), " "), whole), "\n");
  int on = mode == FULL_FROM_HERE || mode == DEAD || mode == HALF_THEN_DEAD;
  if (!at || call < at || (call > at && !on)) return 0;
  switch (mode) {
    case HALF_THEN_DEAD:
      if (call == at && writes) return 2;
    case DEAD: errno = EIO; return 1;
    case KILL: die();
    case HALF_THEN_KILL:
    case SHORT: return writes ? 2 : 0;
    case IO_ERROR: errno = EIO; return 1;
    case NO_SPACE:
    case FULL_FROM_HERE: errno = ENOSPC; return grows;
  }
  return 0;
}

#define REAL(name) static __typeof__(name) *real; if (!real) real = (__typeof__(name) *)dlsym(RTLD_NEXT, #name)
#define FAIL(name, grows, inside) if ((inside) && hit(#name, grows, 0)) return -1

#define WRITE(name, arguments, passed, half)                        \
  ssize_t name arguments {                                          \
    REAL(name);                                                     \
    if (of_file(file)) {                                            \
      int found = hit(#name, 1, size > 1);                          \
      if (found == 1) return -1;                                    \
      if (found == 2) {                                             \
        ssize_t done = real half;                                   \
        if (mode == HALF_THEN_KILL) die();                          \
        return done;                                                \
      }                                                             \
    }                                                               \
    return real passed;                                             \
  }
WRITE(write, (int file, const void *data, size_t size), (file, data, size), (file, data, size / 2))
WRITE(pwrite, (int file, const void *data, size_t size, off_t to), (file, data, size, to), (file, data, size / 2, to))
WRITE(pwrite64, (int file, const void *data, size_t size, off64_t to), (file, data, size, to), (file, data, size / 2, to))

ssize_t writev(int file, const struct iovec *parts, int count) {
  REAL(writev);
  if (of_file(file)) {
    int found = hit("writev", 1, count > 0 && parts[0].iov_len > 1);
    if (found == 1) return -1;
    if (found == 2) {
      ssize_t done = write(file, parts[0].iov_base, parts[0].iov_len / 2);
      if (mode == HALF_THEN_KILL) die();
      return done;
    }
  }
  return real(file, parts, count);
}

#define OPEN(name, before, beforep, folder)                                            \
  int name(before const char *path, int flags, ...) {                                  \
    REAL(name);                                                                        \
    va_list rest;                                                                      \
    va_start(rest, flags);                                                             \
    mode_t made = flags & (O_CREAT | O_TMPFILE) ? va_arg(rest, mode_t) : 0;            \
    va_end(rest);                                                                      \
    FAIL(name, (flags & O_CREAT) != 0, of_path(folder, path));                         \
    return real(beforep path, flags, made);                                            \
  }
#define NONE
#define FOLDER int folder,
#define FOLDERP folder,
OPEN(open, NONE, NONE, AT_FDCWD)
OPEN(open64, NONE, NONE, AT_FDCWD)
OPEN(openat, FOLDER, FOLDERP, folder)
OPEN(openat64, FOLDER, FOLDERP, folder)

#define CALL(kind, name, arguments, passed, grows, inside) \
  kind name arguments {                                    \
    REAL(name);                                            \
    FAIL(name, grows, inside);                             \
    return real passed;                                    \
  }
CALL(ssize_t, read, (int file, void *data, size_t size), (file, data, size), 0, of_file(file))
CALL(int, fsync, (int file), (file), 1, of_file(file))
CALL(int, fdatasync, (int file), (file), 1, of_file(file))
CALL(int, ftruncate, (int file, off_t size), (file, size), 1, of_file(file))
CALL(int, ftruncate64, (int file, off64_t size), (file, size), 1, of_file(file))
CALL(int, fchmod, (int file, mode_t to), (file, to), 0, of_file(file))
CALL(int, fstat, (int file, struct stat *into), (file, into), 0, of_file(file))
CALL(int, fstat64, (int file, struct stat64 *into), (file, into), 0, of_file(file))
CALL(int, stat, (const char *path, struct stat *into), (path, into), 0, of_path(AT_FDCWD, path))
CALL(int, stat64, (const char *path, struct stat64 *into), (path, into), 0, of_path(AT_FDCWD, path))
CALL(int, lstat, (const char *path, struct stat *into), (path, into), 0, of_path(AT_FDCWD, path))
CALL(int, lstat64, (const char *path, struct stat64 *into), (path, into), 0, of_path(AT_FDCWD, path))
CALL(int, fstatat, (int in, const char *path, struct stat *into, int flags), (in, path, into, flags), 0, of_path(in, path))
CALL(int, fstatat64, (int in, const char *path, struct stat64 *into, int flags), (in, path, into, flags), 0, of_path(in, path))
CALL(int, chmod, (const char *path, mode_t to), (path, to), 0, of_path(AT_FDCWD, path))
CALL(int, fchmodat, (int in, const char *path, mode_t to, int flags), (in, path, to, flags), 0, of_path(in, path))
CALL(int, mkdir, (const char *path, mode_t as), (path, as), 1, of_path(AT_FDCWD, path))
CALL(int, mkdirat, (int in, const char *path, mode_t as), (in, path, as), 1, of_path(in, path))
CALL(int, rmdir, (const char *path), (path), 0, of_path(AT_FDCWD, path))
CALL(int, unlink, (const char *path), (path), 0, of_path(AT_FDCWD, path))
CALL(int, unlinkat, (int in, const char *path, int flags), (in, path, flags), 0, of_path(in, path))
CALL(int, rename, (const char *from, const char *to), (from, to), 1, of_path(AT_FDCWD, to))
CALL(int, renameat, (int in, const char *from, int out, const char *to), (in, from, out, to), 1, of_path(out, to))
CALL(int, renameat2, (int in, const char *from, int out, const char *to, unsigned flags), (in, from, out, to, flags), 1, of_path(out, to))
CALL(int, link, (const char *from, const char *to), (from, to), 1, of_path(AT_FDCWD, to))
CALL(int, linkat, (int in, const char *from, int out, const char *to, int flags), (in, from, out, to, flags), 1, of_path(out, to))
CALL(int, symlink, (const char *from, const char *to), (from, to), 1, of_path(AT_FDCWD, to))

DIR *opendir(const char *path) {
  REAL(opendir);
  if (of_path(AT_FDCWD, path) && hit("opendir", 0, 0)) return NULL;
  return real(path);
}
