#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>

struct ring {
    uint8_t *data;
    size_t size, head, count;
};

/* Returns the number of bytes taken, which is less than `length` when the ring is full. */
size_t ring_put(struct ring *ring, const uint8_t *bytes, size_t length)
{
    size_t taken = 0;
    while (taken < length && ring->count < ring->size) {
        ring->data[(ring->head + ring->count) % ring->size] = bytes[taken++];
        ring->count++;
    }
    return taken;
}

int main(void)
{
    struct ring ring = { .data = malloc(16), .size = 16 };
    const uint8_t text[] = "twenty characters ok";
    size_t taken = ring_put(&ring, text, sizeof text - 1);
    free(ring.data);
    return taken == 16 ? EXIT_SUCCESS : EXIT_FAILURE;
}
