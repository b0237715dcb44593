// Memory that the CPU, an NPU and other processes share without a copy: the article's class, and one that works.
//
//     g++ -std=c++17 -Wall -Wextra -fsyntax-only data/zero_copy.cpp
//     g++ -std=c++17 -DTRY_IT -o try data/zero_copy.cpp && ./try      (on a system with a DMA-BUF heap)
//
// Sources: Linux, include/uapi/linux/dma-heap.h and dma-buf.h; Android, "Transition from ION to DMA-BUF heaps".

#if 0  // As the article prints it, indented; nothing in it is recommended.
class ZeroCopyBuffer {
public:
    bool allocate(size_t size) {
        int ion_fd = open("/dev/ion", O_RDONLY);   // 1
        struct ion_allocation_data alloc = {
            .len = size,
            .heap_id_mask = ION_HEAP_SYSTEM_MASK,  // 2
            .flags = ION_FLAG_CACHED               // 3
        };
        ioctl(ion_fd, ION_IOC_ALLOC, &alloc);      // 4
        buffer_ = mmap(nullptr, size, PROT_READ|PROT_WRITE,
                       MAP_SHARED, alloc.fd, 0);   // 5
        return buffer_ != MAP_FAILED;              // 6
    }
};                                                 // 7
#endif
// 1  There is no /dev/ion: Android 12 (kernel 5.10) switched it off, Linux 5.11 dropped it.  That open() gave -1 is not
//    noticed.
// 2  Heap ids differ from chip to chip; since Linux 4.12, the first version with alloc.fd, they are to be asked for
//    (ION_IOC_HEAP_QUERY).
// 3  Cached memory, but nothing synchronizes the caches (DMA_BUF_IOCTL_SYNC): the NPU may read what was there before.
// 4  A failure is not noticed: alloc.fd stays 0, and mmap() then maps standard input.
// 5  buffer_ is declared nowhere, and a second call loses the first mapping.
// 6  ion_fd and alloc.fd stay open and the memory mapped for good: no close(), no munmap(), no destructor.
// 7  Pointer, size and descriptor can be had by nobody, so nothing is shared: the copy to be saved is still needed.

#include <fcntl.h>
#include <linux/dma-buf.h>
#include <linux/dma-heap.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <unistd.h>

#include <cerrno>
#include <cstddef>
#include <cstdint>
#include <system_error>
#include <utility>

[[noreturn]] inline void fail(const char* what) { throw std::system_error(errno, std::generic_category(), what); }

// A file descriptor that is closed with its owner, also when an exception is on its way.
class Descriptor {
public:
    explicit Descriptor(int fd, const char* what) : fd_(fd) {
        if (fd_ < 0) fail(what);
    }
    Descriptor(Descriptor&& other) noexcept : fd_(std::exchange(other.fd_, -1)) {}
    Descriptor& operator=(Descriptor&& other) noexcept {
        std::swap(fd_, other.fd_);
        return *this;
    }
    ~Descriptor() {
        if (fd_ >= 0) ::close(fd_);
    }
    int get() const { return fd_; }

private:
    int fd_;
};

class ZeroCopyBuffer {
public:
    explicit ZeroCopyBuffer(std::size_t size, const char* heap = "/dev/dma_heap/system")
        : fd_(allocate(size, heap)), size_(size),
          data_(::mmap(nullptr, size, PROT_READ | PROT_WRITE, MAP_SHARED, fd_.get(), 0)) {
        if (data_ == MAP_FAILED) fail("mmap of the DMA-BUF");
    }
    ZeroCopyBuffer(ZeroCopyBuffer&& other) noexcept
        : fd_(std::move(other.fd_)), size_(other.size_), data_(std::exchange(other.data_, MAP_FAILED)) {}
    ZeroCopyBuffer& operator=(ZeroCopyBuffer&& other) noexcept {
        std::swap(fd_, other.fd_);
        std::swap(size_, other.size_);
        std::swap(data_, other.data_);
        return *this;
    }
    ~ZeroCopyBuffer() {
        if (data_ != MAP_FAILED) ::munmap(data_, size_);
    }

    int fd() const { return fd_.get(); }  // for QnnMem_register (QNN_MEM_TYPE_ION), or SCM_RIGHTS to another process
    void* data() const { return data_; }
    std::size_t size() const { return size_; }

    // The CPU may read and write while one of these lives; its caches are synchronized with the devices at both ends.
    class Access {
    public:
        explicit Access(const ZeroCopyBuffer& buffer, std::uint64_t flags = DMA_BUF_SYNC_RW)
            : fd_(buffer.fd()), flags_(flags) {
            if (synchronize(DMA_BUF_SYNC_START) < 0) fail("DMA_BUF_IOCTL_SYNC");
        }
        Access(const Access&) = delete;
        Access& operator=(const Access&) = delete;
        ~Access() { synchronize(DMA_BUF_SYNC_END); }

    private:
        int synchronize(std::uint64_t phase) const {
            dma_buf_sync request{flags_ | phase};
            int result;
            do {
                result = ::ioctl(fd_, DMA_BUF_IOCTL_SYNC, &request);
            } while (result < 0 && (errno == EINTR || errno == EAGAIN));
            return result;
        }
        int fd_;
        std::uint64_t flags_;
    };

private:
    static Descriptor allocate(std::size_t size, const char* heap) {
        const Descriptor device(::open(heap, O_RDONLY | O_CLOEXEC), heap);
        dma_heap_allocation_data request{};
        request.len = size;
        request.fd_flags = O_RDWR | O_CLOEXEC;
        if (::ioctl(device.get(), DMA_HEAP_IOCTL_ALLOC, &request) < 0) fail("DMA_HEAP_IOCTL_ALLOC");
        return Descriptor(static_cast<int>(request.fd), "the descriptor of the DMA-BUF");
    }

    Descriptor fd_;  // before data_: it is needed to map
    std::size_t size_;
    void* data_;
};

#ifdef TRY_IT
#include <cstdio>

int main() try {
    ZeroCopyBuffer first(1 << 20), moved(std::move(first));
    auto* seen = static_cast<unsigned char*>(::mmap(nullptr, moved.size(), PROT_READ, MAP_SHARED, moved.fd(), 0));
    if (seen == MAP_FAILED) fail("a second mmap");
    {
        const ZeroCopyBuffer::Access access(moved);
        for (std::size_t i = 0; i < moved.size(); ++i) static_cast<unsigned char*>(moved.data())[i] = i % 251;
    }
    const ZeroCopyBuffer::Access access(moved, DMA_BUF_SYNC_READ);
    for (std::size_t i = 0; i < moved.size(); ++i) {
        if (seen[i] != i % 251) {
            std::puts("the second mapping shows other bytes");
            return 1;
        }
    }
    std::printf("%zu bytes shared, none copied\n", moved.size());
} catch (const std::system_error& error) {
    std::fprintf(stderr, "no buffer: %s\n", error.what());
    return 2;
}
#endif
