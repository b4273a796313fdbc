// The instruction set in use.

#ifndef BIDISTILL_DISPATCH_HPP
#define BIDISTILL_DISPATCH_HPP

#include "kernels.hpp"

namespace bidistill {

const Kernels& kernels();

}  // namespace bidistill

#endif  // BIDISTILL_DISPATCH_HPP
