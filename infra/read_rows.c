/* Read one part of a file into rows of memory and checksum it, without Python in between.
 *
 * Built and called by infra/native.py; infra/objects.py holds the same in Python. Reading and checksumming alternate in
 * pieces that fit a core's cache. */

#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/types.h>
#include <sys/uio.h>
#include <unistd.h>

#if defined(__x86_64__)
#include <immintrin.h>
#define CRC_TARGET __attribute__((target("sse4.2")))
#define CRC_8(crc, word) ((uint32_t)_mm_crc32_u64((crc), (word)))
#define CRC_1(crc, byte) _mm_crc32_u8((crc), (byte))
#elif defined(__aarch64__)
#include <arm_acle.h>
#define CRC_TARGET __attribute__((target("+crc")))
#define CRC_8(crc, word) __crc32cd((crc), (word))
#define CRC_1(crc, byte) __crc32cb((crc), (byte))
#else
#error "no CRC32C instruction is known for this processor"
#endif

/* The instruction takes three cycles, but one can begin in each: three runs side by side are three times as fast. Their
 * results are joined by moving the earlier ones over the length of a run, a linear map kept as four tables of bytes. */
#define LONG_RUN 8192
#define SHORT_RUN 256

typedef uint32_t shift_table[4][256];
static shift_table over_long_run, over_short_run;

CRC_TARGET static void fill_table(shift_table table, size_t run)
{
    uint32_t of_bit[32];
    for (int bit = 0; bit < 32; bit++) {
        uint32_t crc = (uint32_t)1 << bit;
        for (size_t i = 0; i < run; i += 8)
            crc = CRC_8(crc, 0);
        of_bit[bit] = crc;
    }
    for (int place = 0; place < 4; place++)
        for (int byte = 0; byte < 256; byte++) {
            uint32_t moved = 0;
            for (int bit = 0; bit < 8; bit++)
                if (byte >> bit & 1)
                    moved ^= of_bit[8 * place + bit];
            table[place][byte] = moved;
        }
}

static inline uint64_t load_8(const unsigned char *from)
{
    uint64_t word;
    memcpy(&word, from, 8);
    return word;
}

#if defined(__x86_64__)
/* Newer processors multiply polynomials, eight at a time. Sixteen lanes of 16 bytes run along the data; a step moves every
 * lane 256 bytes on, lane * x^2048 mod P, and adds what lies there. With bits reflected, as CRC32C has them, the product
 * of two 64-bit halves stands for x times the product of their polynomials, so the factors are x^(2048 + 64 - 1) for
 * the half that comes first, and x^(2048 - 1) for the other. */
#define FOLD 256

static int folds;
static uint64_t fold_first, fold_second;

static uint64_t power_of_x(int exponent)
{
    uint32_t power = 0x80000000; /* reflected: x^0 is the highest bit */
    while (exponent--)
        power = power >> 1 ^ (power & 1 ? 0x82f63b78 : 0);
    return (uint64_t)power << 32;
}

__attribute__((target("avx512f,vpclmulqdq,sse4.2"))) static uint32_t fold(
    uint32_t crc, const unsigned char **data, size_t *nbytes)
{
    const unsigned char *at = *data;
    const __m512i by = _mm512_set4_epi64(fold_second, fold_first, fold_second, fold_first);
    __m512i lanes[4];
    for (int i = 0; i < 4; i++)
        lanes[i] = _mm512_loadu_si512(at + 64 * i);
    lanes[0] = _mm512_xor_si512(lanes[0], _mm512_zextsi128_si512(_mm_cvtsi32_si128((int)crc)));
    size_t left = *nbytes - FOLD;
    for (at += FOLD; left >= FOLD; at += FOLD, left -= FOLD)
        for (int i = 0; i < 4; i++) {
            __m512i first = _mm512_clmulepi64_epi128(lanes[i], by, 0x00);
            __m512i second = _mm512_clmulepi64_epi128(lanes[i], by, 0x11);
            lanes[i] = _mm512_ternarylogic_epi64(first, second, _mm512_loadu_si512(at + 64 * i), 0x96);
        }
    unsigned char rest[FOLD];
    for (int i = 0; i < 4; i++)
        _mm512_storeu_si512(rest + 64 * i, lanes[i]);
    crc = 0;
    for (int i = 0; i < FOLD; i += 8)
        crc = CRC_8(crc, load_8(rest + i));
    *data = at;
    *nbytes = left;
    return crc;
}
#endif

/* Call once, before anything else. */
void raptor_init(void)
{
    fill_table(over_long_run, LONG_RUN);
    fill_table(over_short_run, SHORT_RUN);
#if defined(__x86_64__)
    folds = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("vpclmulqdq");
    fold_first = power_of_x(8 * FOLD + 63);
    fold_second = power_of_x(8 * FOLD - 1);
#endif
}

static inline uint32_t move_over(shift_table table, uint32_t crc)
{
    return table[0][crc & 255] ^ table[1][crc >> 8 & 255] ^ table[2][crc >> 16 & 255] ^ table[3][crc >> 24];
}

CRC_TARGET static inline uint32_t three_runs(
    shift_table table, size_t run, uint32_t crc, const unsigned char **data, size_t *nbytes)
{
    const unsigned char *at = *data;
    size_t left = *nbytes;
    for (; left >= 3 * run; at += 3 * run, left -= 3 * run) {
        uint32_t second = 0, third = 0;
        for (size_t i = 0; i < run; i += 8) {
            crc = CRC_8(crc, load_8(at + i));
            second = CRC_8(second, load_8(at + run + i));
            third = CRC_8(third, load_8(at + 2 * run + i));
        }
        crc = move_over(table, move_over(table, crc) ^ second) ^ third;
    }
    *data = at;
    *nbytes = left;
    return crc;
}

/* CRC32C of more bytes, given that of the bytes before them (0 for none). */
CRC_TARGET uint32_t raptor_crc32c(const unsigned char *data, size_t nbytes, uint32_t crc)
{
    crc = ~crc;
#if defined(__x86_64__)
    if (folds && nbytes >= 2 * FOLD)
        crc = fold(crc, &data, &nbytes);
#endif
    crc = three_runs(over_long_run, LONG_RUN, crc, &data, &nbytes);
    crc = three_runs(over_short_run, SHORT_RUN, crc, &data, &nbytes);
    for (; nbytes >= 8; data += 8, nbytes -= 8)
        crc = CRC_8(crc, load_8(data));
    for (; nbytes; data++, nbytes--)
        crc = CRC_1(crc, *data);
    return ~crc;
}

#define MOST_PIECES 64

/* Fill all pieces; 0, an errno, or -1 if the file ends first. */
static int read_pieces(int file, struct iovec *pieces, int n_pieces, off_t offset)
{
    while (n_pieces) {
        ssize_t n = preadv(file, pieces, n_pieces, offset);
        if (n < 0 && errno == EINTR)
            continue;
        if (n < 0)
            return errno;
        if (n == 0)
            return -1;
        offset += n;
        while (n_pieces && (size_t)n >= pieces->iov_len) {
            n -= pieces->iov_len;
            pieces++;
            n_pieces--;
        }
        if (n_pieces) {
            pieces->iov_base = (char *)pieces->iov_base + n;
            pieces->iov_len -= n;
        }
    }
    return 0;
}

/* Piece i of a file's bytes from `offset` on goes to base + rows[i] * stride, or to `nowhere` if rows[i] < 0.
 *
 * Returns 0 and the CRC32C of all bytes; an errno; or -1 and the file's size if it ends first. */
int raptor_read_rows(const char *path, int64_t offset, char *base, int64_t stride, const int64_t *rows, int64_t n_rows,
    int64_t row_nbytes, char *nowhere, int64_t group_nbytes, uint32_t *crc, int64_t *file_nbytes)
{
    int file = open(path, O_RDONLY | O_CLOEXEC);
    if (file < 0)
        return errno;
    int result = 0;
    uint32_t sum = 0;
    for (int64_t i = 0; i < n_rows && !result;) {
        struct iovec pieces[MOST_PIECES], left[MOST_PIECES];
        int n = 0;
        do {
            int64_t row = rows[i++];
            pieces[n].iov_base = row < 0 ? nowhere : base + row * stride;
            pieces[n++].iov_len = row_nbytes;
            if (row < 0)
                break; /* the next one for nowhere would overwrite it unseen */
        } while (i < n_rows && n < MOST_PIECES && (n + 1) * row_nbytes <= group_nbytes);
        memcpy(left, pieces, sizeof left);
        result = read_pieces(file, left, n, offset);
        offset += n * row_nbytes;
        for (int j = 0; j < n && !result; j++)
            sum = raptor_crc32c(pieces[j].iov_base, row_nbytes, sum);
    }
    struct stat status;
    *file_nbytes = fstat(file, &status) ? -1 : status.st_size;
    close(file);
    *crc = sum;
    return result;
}

#define SCATTER_BLOCK 32768

/* As raptor_read_rows, from memory: piece i goes to base + rows[i] * stride, or nowhere if rows[i] < 0. The CRC32C of all. */
uint32_t raptor_scatter_rows(
    const unsigned char *from, char *base, int64_t stride, const int64_t *rows, int64_t n_rows, int64_t row_nbytes)
{
    uint32_t sum = 0;
    for (int64_t i = 0; i < n_rows; i++)
        for (int64_t done = 0; done < row_nbytes;) {
            int64_t n = row_nbytes - done < SCATTER_BLOCK ? row_nbytes - done : SCATTER_BLOCK;
            sum = raptor_crc32c(from, n, sum);
            if (rows[i] >= 0)
                memcpy(base + rows[i] * stride + done, from, n);
            from += n;
            done += n;
        }
    return sum;
}
